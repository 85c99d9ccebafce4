"""``python -m hf_cwd script.py ...`` runs an unmodified Trainer script with ``--optim cwd_*`` available."""

import sys

from hf_cwd import launcher

if __name__ == "__main__":
    launcher.main(sys.argv[1:])
