# SPDX-License-Identifier: Apache-2.0
import sys

from fastdistill.cli import main

sys.exit(main())
