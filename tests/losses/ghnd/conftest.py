import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
# For `import map_views` and `import no_synchronisation`.
sys.path[:0] = [str(TESTS / "losses"), str(TESTS / "views")]
