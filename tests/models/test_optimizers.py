# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_mtbi.models.optimizers import OPTIMIZERS, check_optimizers, names


def stepped(kind, **options):
    value = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([value], lr=0.1, **options)
    value.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["initial_lr"] = 0.1  # of the schedule
    return optimizer


def saved(optimizer, named=True):
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    return {**checkpoint, OPTIMIZERS: names([optimizer])} if named else checkpoint


@pytest.mark.parametrize("named", [True, False])
def test_the_same_optimizer_goes_on(named):
    check_optimizers(saved(stepped(torch.optim.AdamW), named), [stepped(torch.optim.AdamW, weight_decay=0.5)])
    check_optimizers(saved(stepped(torch.optim.AdamW), named), [])  # a run that only validates
    check_optimizers({}, [stepped(torch.optim.AdamW)])  # a checkpoint of weights alone


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_another_optimizer_is_refused_with_a_remedy(kind, named):
    then = "the optimizer AdamW" if named else "another optimizer"
    message = f"written with {then}, and model.optim.name gives {kind.__name__}, .*init_from_nemo_model"
    with pytest.raises(ValueError, match=message):
        check_optimizers(saved(stepped(torch.optim.AdamW), named), [stepped(kind)])


def test_adam_is_not_adamw():
    with pytest.raises(ValueError, match="optimizer AdamW, and model.optim.name gives Adam,"):
        check_optimizers(saved(stepped(torch.optim.AdamW)), [stepped(torch.optim.Adam)])
