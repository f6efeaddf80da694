"""`python -m relay` is the `lucent-relay` command."""

import sys

from relay.cli import main

sys.exit(main())
