from mmdet_ptq.analysis import latency as module
from mmdet_ptq.analysis import latency_ratio


def test_models_run_in_turn_and_their_order_changes():
    seen = []
    timed = latency_ratio(lambda: seen.append('a'), lambda: seen.append('b'), pairs=4)
    assert ''.join(seen[2 * module.WARM_UP :]) == 'abbaabba'
    assert timed.pairs == 4 and timed.ratio > 0


def test_the_ratio_says_how_many_times_as_fast_the_second_is(monkeypatch):
    clock, slept = [0.0], []
    monkeypatch.setattr(module.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(module.time, 'sleep', slept.append)

    def takes(seconds):
        def run():
            clock[0] += seconds

        return run

    timed = latency_ratio(takes(3.0), takes(2.0), pairs=3, pause=0.5)
    assert (timed.ratio, timed.first_ms, timed.second_ms) == (1.5, 3000, 2000)
    # a pause is no part of a time, nor is the run that follows it; the warm-up needs none
    assert slept == [0.5] * 6
    assert clock[0] == 5 * (module.WARM_UP + 2 * 3)
