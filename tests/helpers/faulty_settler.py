"""A settler that simulates nothing: a result is the episode id and 4,000 bytes. It dies at the id SOLOVLA_TEST_FAULT."""

import os
from multiprocessing.connection import Connection


def main(connection: Connection) -> None:
    connection.recv()
    while True:
        (start,) = connection.recv()
        if os.environ.get("SOLOVLA_TEST_FAULT") == str(start.episode_id):
            os._exit(3)
        connection.send(("ok", start, (start.episode_id, bytes(4000))))
