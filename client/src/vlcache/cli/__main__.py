"""`python -m vlcache.cli`, the same as the command `vlcache`."""

import sys

from vlcache.cli import main

sys.exit(main())
