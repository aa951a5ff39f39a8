"""A stand-in for Cloud Storage: its JSON API on a port of this machine, as far as TensorStore and Arrow call it.

Objects are in memory; each write gives its object a new generation, and reads, writes and deletes keep to the generations
they name, as https://docs.cloud.google.com/storage/docs/request-preconditions has it. Lists come in pages. The clients find it by
environment variables, also in processes that a test starts.
"""

import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

PAGE = 7  # objects in a page of a list; the real one has 1000


class FakeGCS(ThreadingHTTPServer):
    """The server, running until ``close``.

    Attributes:
        url: its address.
        buckets: for each bucket, name -> (generation, content). A bucket that is not here does not exist.
        requests: (method, bucket, object or "", Range header or None) of all requests, in their order.
        failures: HTTP status codes that the next requests are answered with, instead of what they ask for.
    """

    daemon_threads = True
    generations = itertools.count(1)  # of all servers, and names of buckets: what a client remembers of one is of no other

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {}
        self.requests, self.failures = [], []
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def new_bucket(self) -> str:
        """A new empty bucket, of a name that was not used before."""
        name = f"bucket-{next(self.generations)}"
        self.buckets[name] = {}
        return name

    def files(self, url: str) -> dict[str, bytes]:
        """The content of every object below ``url`` (gs://BUCKET/FOLDER), by its name from there on."""
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        prefix = prefix and prefix.rstrip("/") + "/"
        with self.lock:
            objects = self.buckets[bucket].items()
            return {name.removeprefix(prefix): content for name, (_, content) in sorted(objects) if name.startswith(prefix)}

    def put(self, url: str, content: bytes) -> None:
        """Write the object ``url`` (gs://BUCKET/NAME)."""
        bucket, _, name = url.removeprefix("gs://").partition("/")
        with self.lock:
            self.buckets[bucket][name] = next(self.generations), content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its headers
    server: FakeGCS

    def do_GET(self):
        self.handle_request()

    do_POST = do_DELETE = do_GET

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path.startswith("/computeMetadata/v1/instance/service-accounts/default/"):  # who may read is asked of the machine
            token = {"access_token": "anyone", "expires_in": 3600, "token_type": "Bearer"}
            return self.answer(200, {"email": "default", "scopes": [], **token})
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        if not match:
            return self.answer(400)
        bucket, name = match[1], urllib.parse.unquote(match[2] or query.get("name", ""))
        with self.server.lock:
            self.server.requests.append((self.command, bucket, name, self.headers.get("Range")))
            if self.server.failures:
                return self.answer(self.server.failures.pop(0))
            if bucket not in self.server.buckets:
                return self.answer(404)
            objects = self.server.buckets[bucket]
            if not name:
                return self.list(bucket, objects, query)
            generation, content = objects.get(name, (0, b""))
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
                return self.answer(412)
            if self.command == "POST":
                objects[name] = next(self.server.generations), body
                return self.answer(200, _metadata(bucket, name, *objects[name]))
            if not generation:
                return self.answer(404)
            if self.command == "DELETE":
                del objects[name]
                return self.answer(204)
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            return self.answer(304)
        if query.get("alt") != "media":
            return self.answer(200, _metadata(bucket, name, generation, content))
        self.download(generation, content)

    def list(self, bucket, objects, query):
        """https://docs.cloud.google.com/storage/docs/json_api/v1/objects/list"""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        names = [name for name in sorted(objects) if name.startswith(prefix) and name >= start and (not end or name < end)]
        if delimiter:
            deeper = {name: name.find(delimiter, len(prefix)) for name in names}
            names = sorted({name if at < 0 else name[: at + len(delimiter)] for name, at in deeper.items()})
        names = [name for name in names if name > urllib.parse.unquote(query.get("pageToken", ""))]
        page = names[: min(PAGE, int(query.get("maxResults", PAGE)))]
        answer = {"kind": "storage#objects", "items": [], "prefixes": []}
        for name in page:
            if name in objects:
                answer["items"].append(_metadata(bucket, name, *objects[name]))
            else:
                answer["prefixes"].append(name)
        if len(page) < len(names):
            answer["nextPageToken"] = urllib.parse.quote(page[-1], safe="")
        self.answer(200, answer)

    def download(self, generation, content):
        size, headers, status = len(content), {"x-goog-generation": str(generation)}, 200
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match:
            start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
            stop = min(int(match[2]) + 1, size) if match[1] and match[2] else size
            if start >= size:
                return self.answer(416)
            status, content = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.answer(status, content, headers)

    def answer(self, status: int, content: bytes | dict = b"", headers=None):
        if status >= 400:
            content = {"error": {"code": status, "message": f"stand-in: {status}", "errors": []}}
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _metadata(bucket: str, name: str, generation: int, content: bytes) -> dict:
    updated = f"2024-01-01T00:{generation // 60 % 60:02d}:{generation % 60:02d}.000Z"
    times, numbers = {"updated": updated, "timeCreated": updated}, {"size": str(len(content)), "generation": str(generation)}
    return {"kind": "storage#object", "bucket": bucket, "name": name, "metageneration": "1", **numbers, **times}


@pytest.fixture
def gcs(monkeypatch):
    """A `FakeGCS` that gs:// leads to, in this process and those that it starts."""
    server = FakeGCS()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)  # Arrow's
    monkeypatch.setenv("GCE_METADATA_ROOT", server.url.removeprefix("http://"))
    yield server
    server.close()
