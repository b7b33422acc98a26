import argparse
import errno
import json
import resource

import pytest
import torch

from mmdet_ptq import files
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import check_space, load_tensors, save_tensors, write_atomic, write_json


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / 'a' / 'b.json'
    write_json(path, {'x': 1})
    write_json(path, {'x': 'ä'})
    assert json.loads(path.read_text(encoding='utf-8')) == {'x': 'ä'}
    assert [p.name for p in path.parent.iterdir()] == ['b.json']


@pytest.mark.parametrize('kind', [RuntimeError, KeyboardInterrupt])
def test_exception_inside_write_leaves_nothing_and_keeps_the_old_file(tmp_path, kind):
    path = tmp_path / 'x'
    path.write_text('old')

    def write(file):
        file.write(b'half')
        raise kind('stop')

    with pytest.raises(kind):
        write_atomic(path, write)
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    save_tensors(path, {'a': torch.ones(1)})

    def full(value, file):
        file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(files.torch, 'save', full)
    with pytest.raises(PTQError, match='the disk is full.*--work-dir') as error:
        save_tensors(path, {'a': torch.zeros(1)})
    assert '\n' not in str(error.value)
    assert load_tensors(path)['a'].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


def test_full_disk_while_torch_writes(tmp_path):
    # torch's own writer reports a failed write as RuntimeError, not as OSError
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')

        def flush(self):
            self.file.flush()

    with pytest.raises(PTQError, match='the disk is full'):
        write_atomic(tmp_path / 'x.pth', lambda file: torch.save({'a': torch.ones(10)}, Full(file)))
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(PTQError, match='cannot write'):
        write_json(tmp_path / 'file' / 'x.json', {})


def test_tensors_survive(tmp_path):
    path = tmp_path / 'x.pth'
    save_tensors(path, {'a': torch.arange(3), 'b': ['text', 1.5, None]})
    loaded = load_tensors(path)
    assert loaded['a'].tolist() == [0, 1, 2]
    assert loaded['b'] == ['text', 1.5, None]


def test_pickled_objects_are_refused_with_the_way_to_convert(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}, 'args': argparse.Namespace(lr=1)}, path)
    with pytest.raises(PTQError, match='pickled objects.*convert') as error:
        load_tensors(path)
    assert '\n' not in str(error.value)
    # the hint works
    new = tmp_path / 'new.pth'
    torch.save({'state_dict': torch.load(path, weights_only=False)['state_dict']}, new)
    assert load_tensors(new)['state_dict']['w'].item() == 1


@pytest.mark.parametrize('content', [b'', b'hello', b'<html><body>404</body></html>', b'PK\x03\x04 nothing', bytes(64)])
def test_no_checkpoint_at_all(tmp_path, content):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(PTQError, match='damaged or no torch checkpoint'):
        load_tensors(path)


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(PTQError, match='damaged'):
        load_tensors(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(PTQError, match='there is no checkpoint .*; check the path.$'):
        load_tensors(tmp_path / 'x.pth')
    with pytest.raises(PTQError, match='there is no checkpoint'):
        load_tensors(tmp_path / 'no\0file')
    # where runs keep it
    (tmp_path / 'w8a8').mkdir()
    (tmp_path / 'w8a8' / 'x.pth').touch()
    with pytest.raises(PTQError, match=r"check the path. Did you mean '.*w8a8/x.pth'\?$"):
        load_tensors(tmp_path / 'x.pth')


def test_check_space(tmp_path):
    check_space(tmp_path / 'new' / 'folder', 1)
    assert (tmp_path / 'new' / 'folder').is_dir()
    with pytest.raises(PTQError, match='MiB free and this run writes about'):
        check_space(tmp_path, 1 << 62)
    (tmp_path / 'file').write_text('')
    with pytest.raises(PTQError, match='cannot make the folder'):
        check_space(tmp_path / 'file' / 'folder', 1)


def test_a_limit_on_the_size_of_files_is_one_sentence(tmp_path):
    """torch's writer hides the system's error behind one of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with pytest.raises(PTQError, match=r'cannot write .*x.pth: File too large'):
            save_tensors(tmp_path / 'x.pth', {'a': torch.zeros(10000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match='another'):
        write_atomic(tmp_path / 'x', lambda file: (_ for _ in ()).throw(RuntimeError('another')))
