"""An S3-compatible server in a separate process: ``python -m tests.support.s3_server PORT``.

A line "stop" on its standard input makes it refuse connections; "start" makes it serve again with the same objects.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

BUCKET = "longspan"


class S3Server:
    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.s3_server", str(port)],
            cwd=Path(__file__).parents[2], env={**os.environ, **self.environment}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._answer()

    def stop(self) -> None:
        self._tell("stop")

    def start(self) -> None:
        self._tell("start")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _tell(self, what: str) -> None:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout.readline() == "done\n"


def serve(port: int) -> None:
    import boto3
    from moto.moto_server import threaded_moto_server
    from moto.server import ThreadedMotoServer

    class AtomicPuts(threaded_moto_server.DomainDispatcherApplication):
        """Handles one PUT at a time: moto looks for an object and then creates it, so several writers could succeed."""

        puts = threading.Lock()  # moto has a lock of its own

        def __call__(self, environ, start_response):
            with self.puts if environ["REQUEST_METHOD"] == "PUT" else contextlib.nullcontext():
                return super().__call__(environ, start_response)

    threaded_moto_server.DomainDispatcherApplication = AtomicPuts
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    print("done", flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            server.stop()
        else:
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
            server.start()
        print("done", flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
