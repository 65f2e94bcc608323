"""distill_d2.testing: what it needs no other test to see."""

import subprocess
import sys


def test_the_library_does_not_import_it():
    code = "import sys, distill_d2, distill_d2.engine; sys.exit('distill_d2.testing' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
