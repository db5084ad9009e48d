"""`python -m ctrl_rl.cli`, the same as `ctrl-rl`."""

import sys

from ctrl_rl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
