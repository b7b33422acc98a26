"""Says what is wrong with the environment and how to mend it; exits with 1 on a real problem."""

import runpy
from pathlib import Path

# by path: importing the package imports the very stack that may be broken
runpy.run_path(str(Path(__file__).resolve().parent.parent / 'mmdet_ptq' / 'doctor.py'), run_name='__main__')
