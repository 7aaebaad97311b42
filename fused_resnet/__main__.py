"""`python -m fused_resnet`: the command line (`cli`)."""

import sys

from fused_resnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
