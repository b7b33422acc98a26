"""Empty annotations for heads that ask for some: of the right form, and of each sample alone."""

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdet_ptq.predictions.samples import with_annotations


def test_empty_annotations_have_the_form_of_real_ones():
    (sample,) = with_annotations([DetDataSample()])
    boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
    assert boxes.shape == (0, 4) and boxes.dtype == torch.float32
    assert labels.shape == (0,) and labels.dtype == torch.long


def test_everything_else_of_a_sample_stays_and_the_order_too():
    samples = [DetDataSample(metainfo=dict(img_id=i, img_shape=(8, i))) for i in range(3)]
    samples[0].proposals = InstanceData(bboxes=torch.ones(2, 4))
    samples[1].gt_instances = InstanceData(bboxes=torch.ones(1, 4), labels=torch.ones(1))
    found = with_annotations(samples)
    assert [(sample.img_id, sample.img_shape) for sample in found] == [(0, (8, 0)), (1, (8, 1)), (2, (8, 2))]
    assert torch.equal(found[0].proposals.bboxes, torch.ones(2, 4)) and found[1] is samples[1]
    assert [len(sample.gt_instances) for sample in found] == [0, 1, 0]


def test_what_is_added_to_one_sample_reaches_no_other():
    plain = DetDataSample(metainfo=dict(img_id=1))
    first, second = with_annotations([plain, plain])
    first.gt_instances = InstanceData(bboxes=torch.ones(5, 4), labels=torch.ones(5))
    first.proposals = InstanceData()
    first.set_metainfo(dict(img_id=2))
    assert len(second.gt_instances) == 0 and 'proposals' not in second and second.img_id == 1
    assert plain.keys() == [] and plain.img_id == 1
