import re
from html.parser import HTMLParser

import pytest
import torch

from mmdet_ptq.analysis import ReportInputs, build_report, headlines, write_report
from mmdet_ptq.analysis.report import in_percent
from mmdet_ptq.calibration.protection.damage import Damage
from mmdet_ptq.calibration.protection.protect import Choice, Protection
from mmdet_ptq.predictions import AlignedPredictions

VOID = {'meta', 'img', 'br', 'link'}


class Balance(HTMLParser):
    """Fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attrs):
        if tag == 'img':
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


def text_of(page):
    return re.sub(r'\s+', ' ', re.sub(r'<style>.*?</style>|<[^>]+>', ' ', page, flags=re.S))


@pytest.fixture(scope='module', autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmdet_ptq.analysis.pictures.DPI', 30)
        patch.setattr('mmdet_ptq.analysis.report.NUM_IMAGES', 1)
        yield


@pytest.fixture(scope='module')
def page(tiny, whole_results, batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    batches = [batch(3), batch(4)]
    path = build_report(folder, whole_results, tiny.structure, tiny.detector, tiny.original, batches)
    assert path == folder / 'report.html'
    return path.read_text()


def test_headline_figures(page, results):
    text = text_of(page)
    for figure in ('0.412 → 0.400', '-1.2 points', '4.00x less', '16.00x less', '100 %'):
        assert figure in text
    assert '- 1.80x' in text.replace('  ', ' ')


def test_page_is_whole_and_needs_nothing_else(page):
    parser = parse(page)
    assert len(parser.images) == 1 + 3  # detections; drift, errors, weights
    assert all(re.match('data:image/(png|jpeg);base64,', i['src']) and i['alt'] for i in parser.images)
    assert 'http' not in page and '<script' not in page and '<link' not in page
    assert 'prefers-color-scheme: dark' in page


def test_everything_of_the_run_is_told(page, tiny, results):
    text = text_of(page)
    for layer in tiny.structure.layers:
        assert layer.name in text
    for name, version in results['versions'].items():
        assert f'{name} {version}' in text
    for told in (
        'observe 2.5',
        'together 3.8',
        'Calibrated on 3 images (seed 0, that of the run 7, 3 ids',
        '1 could not be read',
        'broken.jpg',
        'w8a8_observe',
        '8-bit affine',
        'Noisiest: (1)',
        'coco/bbox_mAP_s - - - - -',
    ):
        assert told in text


def test_protection_and_reconstruction_are_told_where_there_were_any(tiny, results, tmp_path):
    path = tmp_path / 'r.html'
    write_report(path, ReportInputs(results, tiny.structure))
    assert 'Protected tensors' not in path.read_text() and 'Reconstruction' not in path.read_text()
    choice = Choice('input of <conv>', 'activation', ('conv',), '8-bit affine', '16-bit affine', 0.5, 0.01, -12, 0, 0)
    protection = Protection({}, [choice], Damage(0.9), Damage(0.125), 1000, 2000)
    results['protection'] = protection.to_dict()
    results['reconstruction'] = [dict(name='neck.a', before=0.25, after=0.0625, outcome='trained', seconds=1.0)]
    write_report(path, ReportInputs(results, tiny.structure))
    parse(path.read_text())
    text = text_of(path.read_text())
    assert 'Protected tensors' in text and '0.9 before, 0.125 after' in text
    assert 'input of &lt;conv&gt; 8-bit affine 16-bit affine 0.5 0.01 -12 B' in text
    assert 'neck.a 0.25 0.0625 trained' in text
    results['protection'] = Protection({}, [], Damage(0.9), Damage(0.9), 1, 1).to_dict()
    write_report(path, ReportInputs(results, tiny.structure))
    assert 'No other format helped noticeably' in text_of(path.read_text())


def test_what_the_processor_makes_wrong_is_marked(tiny, results, tmp_path):
    results['rows'][2]['remark'] = 'its sums <saturate> here'
    write_report(tmp_path / 'report.html', ReportInputs(results, tiny.structure))
    text = (tmp_path / 'report.html').read_text()
    assert f'{results["rows"][2]["model"]} (!)</th>' in text
    assert '(!): its sums &lt;saturate&gt; here</p>' in text


def test_text_is_escaped(tiny, results, tmp_path):
    results['config'] = 'configs/<b>&.py'
    write_report(tmp_path / 'r.html', ReportInputs(results, tiny.structure))
    page = (tmp_path / 'r.html').read_text()
    assert '<b>' not in page and '&lt;b&gt;&amp;' in page


def test_without_annotations(tiny, results, batch, tmp_path):
    for row in results['rows']:
        row['metrics'] = {}
    page = build_report(tmp_path, results, tiny.structure, tiny.detector, None, [batch(3)]).read_text()
    assert 'not measured' in page and '4.00x less' in page
    assert len(parse(page).images) == 1 + 3


def test_without_images_or_rows(tiny, results, tmp_path):
    results.update(rows=[], stages={})
    page = build_report(tmp_path, results, tiny.structure, tiny.detector, tiny.original, []).read_text()
    text = text_of(page)
    for told in (
        'No model has been evaluated',
        'There were no images to show',
        'there were no images to predict on',
        'there were no images to run on',
    ):
        assert told in text
    assert len(parse(page).images) == 1  # the weights need no images


def test_a_head_without_adapter(tiny, results, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'mmdet_ptq.analysis.drift.predict_aligned', lambda *_: AlignedPredictions(None, raw=[torch.zeros(1)])
    )
    page = build_report(tmp_path, results, tiny.structure, tiny.detector, tiny.original, [batch(3)]).read_text()
    assert 'the head has no adapter' in page
    assert 'no layer ran alike' in page
    assert len(parse(page).images) == 1 + 1


def test_a_detector_that_cannot_be_drawn(tiny, results, batch, tmp_path, monkeypatch):
    def broken(*_):
        raise AttributeError('no <pred_instances>')

    monkeypatch.setattr('mmdet_ptq.analysis.report.detect_both', broken)
    page = build_report(tmp_path, results, tiny.structure, tiny.detector, tiny.original, [batch(3)]).read_text()
    assert 'This detector does not allow it (AttributeError: no &lt;pred_instances&gt;)' in page
    assert len(parse(page).images) == 3


def test_two_stages(tiny_two_stage, results, batch, tmp_path):
    tiny = tiny_two_stage
    page = build_report(tmp_path, results, tiny.structure, tiny.detector, tiny.original, [batch(3)]).read_text()
    assert 'does not allow it' not in page and 'Not drawn' not in page
    assert 'roi_head.bbox_head.fc_reg' in page
    assert len(parse(page).images) == 1 + 3


def test_headlines_name_the_quantized_row(results, tiny):
    results['rows'] = [results['rows'][0], results['rows'][2]]
    assert [h.detail for h in headlines(results, tiny.structure) if h.label == 'change'] == [
        'onnxruntime against float'
    ]


@pytest.mark.parametrize(
    ('share', 'text'), [(1, '100 %'), (0, '0 %'), (0.99999, '99.99 %'), (1e-9, '0.01 %'), (0.5, '50.00 %')]
)
def test_percent_says_all_only_of_all(share, text):
    assert in_percent(share) == text
