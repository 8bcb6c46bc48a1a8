"""A server of a folder's files over HTTP, in ranges, with the faults of real ones."""

import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """faults: by a file's name, what its next answers suffer, in turn:

    an HTTP status; "cut", which breaks off half-way; "short", which ends half-way as if that were all; "slow", which
    dawdles; "whole", which ignores the range.
    requests: by a file's name, the bytes that each request asked for.
    """

    def __init__(self, folder, url):
        self.folder, self.url = folder, url
        self.faults = defaultdict(list)
        self.requests = defaultdict(list)

    def urls(self, pattern="*.parquet"):
        return [f"{self.url}/{path.name}" for path in sorted(self.folder.glob(pattern))]


@contextmanager
def serving(folder):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.strip("/")
            fault = server.faults[name].pop(0) if server.faults[name] else None
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = (folder / name).read_bytes()
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = content if fault == "whole" else content[first : last + 1]
            part = part[: 1 + len(part) // 2] if fault == "short" else part
            server.requests[name].append(len(part))
            self.send_response(200 if fault == "whole" else 206)
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if fault == "slow":
                for start in range(0, len(part), 1 + len(part) // 5):
                    self.wfile.write(part[start : start + 1 + len(part) // 5])
                    self.wfile.flush()
                    time.sleep(0.01)
            elif fault == "cut":
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
            else:
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = FileServer(folder, f"http://127.0.0.1:{http.server_address[1]}")
        yield server
        http.shutdown()
