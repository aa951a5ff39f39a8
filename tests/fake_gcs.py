"""A stand-in for Cloud Storage: its JSON API on a port of this machine, as far as TensorStore, Arrow and gcsfs call it.

Objects are in memory; each write gives its object a new generation, and reads, writes and deletes keep to the generations
they name, as https://docs.cloud.google.com/storage/docs/request-preconditions has it. Lists come in pages. The clients find it by
environment variables, also in processes that a test starts.
"""

import itertools
import json
import re
import sys
import threading
import urllib.parse
from contextlib import contextmanager
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
        read_only: buckets of which nothing can be changed.
        hidden: buckets of which only the objects can be seen.
    """

    daemon_threads = True
    generations = itertools.count(1)  # of all servers, and names of buckets: what a client remembers of one is of no other

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {}
        self.requests, self.failures, self.read_only, self.hidden = [], [], set(), set()
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable ones under way: the object, and what has come
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # gcsfs asks two questions at once, and hangs up when one is answered
            super().handle_error(request, client_address)

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
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/([^/]+))?(?:/moveTo/o/([^/]+))?", url.path)
        if not match:
            return self.answer(400)
        bucket, name, target = match[1], urllib.parse.unquote(match[3] or query.get("name", "")), urllib.parse.unquote(match[4] or "")
        if query.get("uploadType") == "multipart":
            name, body = _parts(body, self.headers)
        with self.server.lock:
            self.server.requests.append((self.command, bucket, name, self.headers.get("Range")))
            if self.server.failures:
                return self.answer(self.server.failures.pop(0))
            if bucket not in self.server.buckets:
                return self.answer(404)
            if not match[2] and bucket in self.server.hidden:
                return self.answer(403)
            if not match[2]:
                return self.answer(200, {"kind": "storage#bucket", "name": bucket})
            if self.command != "GET" and bucket in self.server.read_only:
                return self.answer(403)
            objects = self.server.buckets[bucket]
            if query.get("uploadType") == "resumable":
                name, body = self.resume(url.path, name, query, body)
                if body is None:
                    return
            if not name:
                return self.list(bucket, objects, query)
            generation, content = objects.get(name, (0, b""))
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
                return self.answer(412)
            if self.command == "POST" and not target:
                objects[name] = next(self.server.generations), body
                return self.answer(200, _metadata(bucket, name, *objects[name]))
            if not generation:
                return self.answer(404)
            if target:
                del objects[name]
                objects[target] = next(self.server.generations), content
                return self.answer(200, _metadata(bucket, target, *objects[target]))
            if self.command == "DELETE":
                del objects[name]
                return self.answer(204)
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            return self.answer(304)
        if query.get("alt") != "media":
            return self.answer(200, _metadata(bucket, name, generation, content))
        self.download(generation, content)

    def resume(self, path, name, query, body):
        """https://docs.cloud.google.com/storage/docs/performing-resumable-uploads: (object, content) when all is there."""
        if "upload_id" not in query:
            number = str(next(self.server.generations))
            self.server.uploads[number] = name, bytearray()
            self.answer(200, {}, {"Location": f"{self.server.url}{path}?uploadType=resumable&upload_id={number}"})
            return None, None
        name, content = self.server.uploads[query["upload_id"]]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            self.answer(308, b"", {"Range": f"bytes=0-{len(content) - 1}"})
            return None, None
        return name, bytes(content)

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


def _parts(body: bytes, headers) -> tuple[str, bytes]:
    """(the object, its content) of an upload in one request, of two parts: what it is called, and what it holds."""
    boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
    _, metadata, content, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary) + rb"(?:--)?(?:\r?\n)?", body)
    name, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (metadata, content))
    return json.loads(name)["name"], content


def _metadata(bucket: str, name: str, generation: int, content: bytes) -> dict:
    updated = f"2024-01-01T00:{generation // 60 % 60:02d}:{generation % 60:02d}.000Z"
    times, numbers = {"updated": updated, "timeCreated": updated}, {"size": str(len(content)), "generation": str(generation)}
    return {"kind": "storage#object", "bucket": bucket, "name": name, "metageneration": "1", **numbers, **times}


@pytest.fixture
def gcs(monkeypatch):
    """A `FakeGCS` that gs:// leads to, in this process and those that it starts."""
    with serve(monkeypatch) as server:
        yield server


@contextmanager
def serve(monkeypatch):
    """The same, for fixtures of another scope."""
    server = FakeGCS()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)  # Arrow's
    monkeypatch.setenv("GCE_METADATA_ROOT", server.url.removeprefix("http://"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)  # that of gcsfs and of Google's own client
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks by gRPC what kind a bucket is of
    yield server
    server.close()
