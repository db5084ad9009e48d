"""`python -m ctrl_rl.cli`, the same as `ctrl-rl`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python searches the working directory first, where a run from elsewhere may lie; the commands
    # that take modules of the user's add it themselves.
    if sys.path[0] == str(Path.cwd()):
        del sys.path[0]
    from ctrl_rl.cli.main import main

    sys.exit(main())
