"""A settler that simulates nothing. A result is the episode id and 4,000 bytes. It dies at SOLOVLA_TEST_FAULT's id."""

import os
from multiprocessing.connection import Connection


def main(connection: Connection) -> None:
    connection.recv()
    while True:
        (start,) = connection.recv()
        if os.environ.get("SOLOVLA_TEST_FAULT") == str(start.episode_id):
            os._exit(3)
        connection.send(("ok", start, (start.episode_id, bytes(4000))))
