"""PTQRunner: a stock mmengine Runner that quantizes its detector and reports what it cost."""

from __future__ import annotations

import logging

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.analysis import float_size_bytes, print_lines
from mmdet_ptq.config import DYNAMIC
from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.engine import stages
from mmdet_ptq.engine.global_stage.rehearsal import check_holdout, rehearse_global
from mmdet_ptq.engine.plan import make_plan, plan_lines
from mmdet_ptq.engine.run import Run
from mmdet_ptq.engine.work_dir import leave_work_dir
from mmdet_ptq.files import check_space
from mmdet_ptq.predictions import check_raw_outputs
from mmdet_ptq.registry import RUNNERS


@RUNNERS.register_module()
class PTQRunner(Run):
    """Runs post-training quantization: prepare, observe, protect, reconstruct, global, evaluate,
    export, report.

    Everything the global stage needs (loop, optimizer wrapper, schedulers, checkpoints, logging, visualizer back
    ends) is mmengine's own; the user's training loop, optimizer and custom hooks are not touched and not used.
    Arguments and attributes are those of :class:`.run.Run`.
    """

    def run(self, dry: bool = False) -> dict:
        """Tells the plan, then runs every stage.

        Args:
            dry: Whether to stop after the plan. Defaults to False.

        Returns:
            What ``results.json`` holds; nothing for a dry run.
        """
        try:
            self.check()
            plan = make_plan(self)
            self.stages.expected = plan.seconds
            if is_main_process():
                print_lines(plan_lines(self, plan))
            if dry:
                return {}
            self.export_float()
            self.evaluate_float()
            self.calibrate()
            self.evaluate()
            self.export()
            for block in self.other_blocks:
                part = self.part(block)
                part.calibrate()
                part.evaluate_part()
                part.export()
            self.report()
        finally:
            leave_work_dir(self.work_dir)
        return self.results

    def begin(self) -> None:
        """Checks all that can be checked before the calibration, and exports the float detector."""
        self.check()
        self.export_float()

    def check(self) -> None:
        """Checks all that can be checked before anything that takes long."""
        for told in self.ptq.deprecated():
            print_log(told, 'current', logging.WARNING)
        check_space(self.work_dir, 6 * float_size_bytes(self.detector))
        for name in self.runtimes:
            get_runtime(name).check_detector(self.detector)
            if self.ptq.export_size == DYNAMIC:
                get_runtime(name).check_dynamic_size(self.detector)
            get_runtime(name).check()
            get_runtime(name).check_export()
        if (self.ptq.protect, self.ptq.reconstruct, self.ptq.global_loss) != (None, None, None):
            check_raw_outputs(self.detector)
        self.load()
        if self.runtimes:
            self.choose_canvas()
        if self.ptq.reconstruct is not None:
            check_holdout('ptq.reconstruct', self.ptq.reconstruct.holdout, len(self.calibration))
        if self.ptq.global_loss is not None:
            rehearse_global(self.ptq.global_loss, len(self.calibration))

    def calibrate(self) -> nn.Module:
        """Runs the stages up to the integer checkpoint.

        Returns:
            The detector rebuilt from the integer checkpoint.
        """
        if self.float_detector is None:
            self.begin()
        self.prepare()
        for name in self.ptq.export:
            get_runtime(name).check_formats(self.structure)
        self.observe()
        if self.ptq.protect is not None:
            self.protect()
        if self.ptq.reconstruct is not None:
            self.reconstruct()
        if self.ptq.global_loss is not None:
            self.minimise_global_loss()
        self.write_quantized()
        return self.detector

    # each stage by itself, as a method
    prepare = stages.calibrate.prepare
    observe = stages.calibrate.observe
    protect = stages.calibrate.protect
    reconstruct = stages.calibrate.reconstruct
    minimise_global_loss = stages.calibrate.minimise_global_loss
    write_quantized = stages.calibrate.write_quantized
    evaluate_float = stages.measure.evaluate_float
    evaluate = stages.measure.evaluate
    evaluate_part = stages.measure.evaluate_part
    report = stages.measure.report
    export = stages.export.export
    export_float = stages.export.export_float
