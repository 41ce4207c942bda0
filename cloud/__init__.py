"""Floor 3: the cloud service. Never imports isthmus.edge."""

import os

# At every barrier torch's OpenMP threads spin 300,000 times before they sleep. Where another process wants a
# core (the edge on the same machine, a second service), each of a step's hundreds of barriers then waits for
# the kernel's next time slice: 150 small matrix products took 444 ms like that, and 23 ms with no spinning.
# No spinning at all doubles a step on a quiet machine (15 against 6 ms), this much costs 8 ms there and 17 ms
# on a busy one. The runtime reads it when torch is first imported, hence here; the user's own setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
