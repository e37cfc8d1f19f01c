"""`python -m tests.regression.register`."""

import sys

from tests.regression.register import main

sys.exit(main(sys.argv[1:]))
