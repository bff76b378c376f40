"""The lane: HTTP/1.1 under inspection, read strictly and carried by the gate's own loop at the cost of a C proxy.

http1     the grammar of heads                       body      the framing of bodies
client    one connection, request by request         exchange  one request, judged and carried
upstream  the connection to its origin                side      one end of either, as bytes
tls       whose leaf is shown, who is trusted         bounds    what all of them may take together
pace      whether a request goes on fast enough       pool      what waits for another client
lane      these parts together, for a gate
"""

from proxy.lane.lane import Lane as Lane
