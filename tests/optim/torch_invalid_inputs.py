"""Gives every invalid input of torch's own tests to our twins, and prints what each raises, as JSON lines.

A process of its own: importing torch's tests freezes the flags of torch.backends.
"""

import json
import warnings

import torch
from torch.testing._internal import common_optimizers

from hf_cwd import CWDSGD, CWDAdamW, CWDMuon

TWINS = {torch.optim.AdamW: CWDAdamW, torch.optim.SGD: CWDSGD, torch.optim.Muon: CWDMuon}


def raised(cls, params, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            cls(params, **options)
        except Exception as error:
            return type(error).__name__, str(error)
    return "nothing", ""


for info in common_optimizers.optim_db:
    if info.optim_cls in TWINS:
        ours, name = TWINS[info.optim_cls], info.optim_cls.__name__
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = case.optimizer_error_input
            told = (name, given.desc, case.error_type.__name__)
            print(json.dumps([*told, *raised(ours, given.params, given.kwargs)]))
            if given.params is not None and given.kwargs:
                print(json.dumps([name, f"{given.desc}, with None", told[2], *raised(ours, None, given.kwargs)]))
