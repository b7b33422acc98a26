import pytest
import torch

from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.errors import PTQError


def test_what_does_not_fit_in_memory_goes_to_disk_and_comes_back(tmp_path):
    store = ActivationStore(limit_bytes=100, folder=tmp_path / 'cache')
    tensors = [torch.randn(4, 5) for _ in range(3)]
    numbers = [store.put(t) for t in tensors]
    assert store.bytes_in_memory == 80 and store.bytes_on_disk == 160
    assert all(torch.equal(store.get(n), t) for n, t in zip(numbers, tensors, strict=True))
    store.drop(numbers[0])
    assert store.bytes_in_memory == 0
    store.drop(numbers[1])
    assert len(list((tmp_path / 'cache').rglob('*.pt'))) == 1
    store.close()
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_copy_is_kept():
    store, x = ActivationStore(1000, '.'), torch.zeros(3)
    number = store.put(x)
    x += 1
    assert (store.get(number) == 0).all()


def test_no_space_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), dict(free=0))())
    with pytest.raises(PTQError, match='space'):
        ActivationStore(0, tmp_path).put(torch.zeros(10))
