"""Says what is wrong with the environment and how to mend it; exits with 1 on a real problem."""
import sys
from pathlib import Path

# the doctor must work where the package is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdet_ptq.doctor import main

if __name__ == '__main__':
    sys.exit(main())
