"""What stock mitmproxy loads: `mitmweb -s addons/outgate.py --set policy=FILE` (docs/mitmproxy.md)."""

from addons.stock import Stock

addons = [Stock()]
