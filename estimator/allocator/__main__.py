"""``python -m estimator.allocator TRACE.json.gz``."""

import sys

from estimator.allocator.replay import main

sys.exit(main(sys.argv[1:]))
