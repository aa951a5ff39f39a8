"""Buckets of Cloud Storage: that they are there, before anything is created."""

from hybrid_jax.config import ConfigError
from launch import shell
from launch.gcloud import describe_bucket


def check(bucket: str, project: str | None = None, region: str | None = None) -> None:
    """Raises ConfigError where Google Cloud does not show ``bucket``; a note where it is not in ``region``."""
    described = shell.ask(describe_bucket(bucket, project))
    if described.returncode:
        make = f"gcloud storage buckets create gs://{bucket} --location={region or 'REGION'}"
        raise ConfigError(f"gs://{bucket} cannot be reached: {shell.reason(described)}; nothing was created. To make it: {make}")
    if region and (location := described.stdout.strip().lower()) != region:
        print(f"note: gs://{bucket} is in {location}, the machines in {region}: reading and writing is slower, and may cost", flush=True)
