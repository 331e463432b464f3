"""The nodes of the integration tests, attacked."""

from tests.integration.conftest import home, node, setuid_node, userns_node  # noqa: F401 (fixtures)
