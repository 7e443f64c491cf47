"""A server of streaming speech: `snax serve`.

`service` decodes the streams of all clients with one `snax.StreamPool`, in an asyncio event loop. `app` is its
WebSocket and HTTP interface, `requests` reads parameters and bodies, `metrics` has the Prometheus metrics, and `server`
owns the socket and the signals.
"""
