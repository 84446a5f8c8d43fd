"""``python -m barefoot``: the same as the ``barefoot`` command."""

import sys

from barefoot.cli.main import main

sys.exit(main())
