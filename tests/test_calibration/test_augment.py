import pytest
import torch

from mmdet_ptq.calibration.augment import SMALLEST_CROP, Augmented

COUNT = 3


class Samples(torch.utils.data.Dataset):
    metainfo = dict(classes=('disc',))

    def __init__(self, dtype=torch.uint8):
        # ramps: every part of one, enlarged, is a ramp again that rises less
        ramp = torch.stack([2 * torch.arange(64.0).expand(48, 64), 2 * torch.arange(48.0)[:, None].expand(48, 64)])
        self.images = [(ramp[[0, 1, 0]] + index).to(dtype) for index in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=f'sample {index}')


def test_versions_are_the_image_its_mirror_image_and_parts_of_both():
    samples = Samples()
    found = Augmented(samples, 6, seed=0)
    assert len(found) == 6 * COUNT and found.metainfo == samples.metainfo
    shares = []
    for index in range(COUNT):
        versions = [found[version * COUNT + index] for version in range(6)]
        assert {v['data_samples'] for v in versions} == {f'sample {index}'}
        assert {(v['inputs'].shape, v['inputs'].dtype) for v in versions} == {((3, 48, 64), torch.uint8)}
        assert torch.equal(versions[0]['inputs'], samples.images[index])
        assert torch.equal(versions[1]['inputs'], samples.images[index].flip(-1))
        for number, version in enumerate(versions[2:], 2):
            across, down, _ = version['inputs'].float()
            rises = [(across[:, -8] - across[:, 8]).mean() / (2 * 48), (down[-8] - down[8]).mean() / (2 * 32)]
            assert (rises[0] < 0) == bool(number % 2)
            # the same proportions
            assert abs(abs(rises[0]) - rises[1]) < 0.05 and SMALLEST_CROP - 0.03 < rises[1] <= 1
            shares.append(float(rises[1]))
    assert min(shares) < 0.7 and max(shares) > 0.8


@pytest.mark.parametrize('seed', [0, 7])
def test_a_version_is_the_same_whenever_it_is_asked_for(seed):
    first, second = Augmented(Samples(), 4, seed), Augmented(Samples(), 4, seed)
    parts = [first[position]['inputs'] for position in range(2 * COUNT, 4 * COUNT)]
    again = [second[position]['inputs'] for position in reversed(range(2 * COUNT, 4 * COUNT))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = [Augmented(Samples(), 4, seed + 1)[position]['inputs'] for position in range(2 * COUNT, 4 * COUNT)]
    assert not any(torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_floating_point_images_stay_so():
    part = Augmented(Samples(torch.float32), 3, seed=0)[2 * COUNT]['inputs']
    assert part.dtype == torch.float32 and not torch.equal(part, part.round())
