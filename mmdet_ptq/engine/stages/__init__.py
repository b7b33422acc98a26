"""What a run does, one stage after another; each takes a :class:`mmdet_ptq.engine.run.Run`."""

from mmdet_ptq.engine.stages import calibrate, export, measure

__all__ = ['calibrate', 'export', 'measure']
