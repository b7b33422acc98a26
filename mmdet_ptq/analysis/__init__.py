"""What was gained and lost: cost, drift, tables and the report."""

from mmdet_ptq.analysis.advice import closing_lines
from mmdet_ptq.analysis.cost import PartSummary, bops, float_bops, part_summary
from mmdet_ptq.analysis.drift import LayerError, ScoreDrift, layer_errors, score_drift
from mmdet_ptq.analysis.figures import headline_metric
from mmdet_ptq.analysis.latency import LatencyRatio, latency_ratio
from mmdet_ptq.analysis.report import REPORT, ReportInputs, build_report, headlines, write_report
from mmdet_ptq.analysis.results import new_results, read_results, result_row, versions, write_results
from mmdet_ptq.analysis.sensitivity import print_protection
from mmdet_ptq.analysis.table import print_lines, print_results, result_lines, results_table
from mmdet_ptq.analysis.verdict import verdict_lines
from mmdet_ptq.wrapping.coverage import float_size_bytes

__all__ = [
    'REPORT',
    'LatencyRatio',
    'LayerError',
    'PartSummary',
    'ReportInputs',
    'ScoreDrift',
    'bops',
    'closing_lines',
    'build_report',
    'float_bops',
    'float_size_bytes',
    'headline_metric',
    'headlines',
    'latency_ratio',
    'layer_errors',
    'new_results',
    'part_summary',
    'print_lines',
    'print_protection',
    'print_results',
    'read_results',
    'result_lines',
    'result_row',
    'results_table',
    'score_drift',
    'verdict_lines',
    'versions',
    'write_report',
    'write_results',
]
