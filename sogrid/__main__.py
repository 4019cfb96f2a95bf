"""``python -m sogrid``: see :mod:`sogrid.cli`."""

import sys

from sogrid.cli import main

sys.exit(main())
