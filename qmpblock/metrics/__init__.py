"""Figures of many VMs, for whoever watches over them: gathered at once, in Prometheus's words.

`figures` looks at VMs, each within a bounded time; `text` says what was seen; `textfile` puts it
where Prometheus's node exporter finds it.
"""

from __future__ import annotations
