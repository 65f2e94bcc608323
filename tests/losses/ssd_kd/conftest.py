import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
# For `import recorded, no_synchronisation` and `import naive_ssd, ssd_case`.
sys.path[:0] = [str(TESTS / "views"), str(TESTS / "ssd")]
