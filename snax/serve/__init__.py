"""A server of streaming speech: `snax serve`.

`service` decodes the streams of all clients with one `snax.StreamPool`, in an asyncio event loop. `app` is its
WebSocket and HTTP interface, and `metrics` has its Prometheus metrics.
"""
