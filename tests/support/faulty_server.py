"""Names of the one HTTP server, for tests of transfers."""

from tests.support.http_server import HUB_COMMIT, Fault, HttpServer

FaultyServer = HttpServer
__all__ = ["HUB_COMMIT", "Fault", "FaultyServer"]
