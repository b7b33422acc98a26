"""Plain data: what becomes of other containers, and which sentence tells what is wrong."""

from collections import OrderedDict

import pytest
from mmengine.config import ConfigDict

from mmdet_ptq.fields import Each, Fields, Malformed, Whole, check_form, plain, qualified

FORM = Fields(dict(name=str, count=Whole(1, 8)), dict(sizes=[float], inner=Each((None, bool))))


def test_containers_of_any_class_become_plain_ones():
    given = ConfigDict(a=(1, [OrderedDict(b=Whole)]), c=None)
    told = plain(given, lambda value: qualified(value) if isinstance(value, type) else value)
    assert told == dict(a=[1, [dict(b='mmdet_ptq.fields.Whole')]], c=None)
    assert type(told) is dict and type(told['a'][1][0]) is dict
    assert plain({3: (1, 2)}, str, tuple) == {'3': ('1', '2')}


@pytest.mark.parametrize(
    'value, told',
    [
        (dict(name='a', count=8, sizes=(1, 2.5), inner=dict(x=None, y=True)), ''),
        (dict(name='a'), 'it lacks the field `count`'),
        (dict(name='a', count=9), 'it.count must be a whole number from 1 to 8, got 9'),
        (dict(name='a', count=True), 'it.count must be a whole number from 1 to 8, got True'),
        (dict(name='a', count=1, other=2), 'it has the unknown field `other`'),
        (dict(name='a', count=1, sizes=[1, 'b']), "it.sizes[1] must be a number, got 'b'"),
        (dict(name='a', count=1, inner=dict(x=3)), 'it.inner.x must be True or False, got 3'),
        ([], 'it must be a dict, got a list'),
    ],
)
def test_the_first_thing_that_is_wrong_is_told(value, told):
    if not told:
        check_form(value, FORM, 'it')
        return
    with pytest.raises(Malformed) as error:
        check_form(value, FORM, 'it')
    assert str(error.value) == told
