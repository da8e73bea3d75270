"""The PEFT types `BORA` and `RAVAN`, added to PEFT's closed enumeration.

`register_peft_method` accepts only members of `peft.utils.PeftType`, and saved configs name their type by its value,
so an out-of-tree method needs a real member: one that pickles, copies, serializes and is found by value.
"""

from __future__ import annotations

from peft.utils import PeftType


def _extend_peft_type(name: str) -> PeftType:
    """Return the member of `PeftType` of this name, adding it on the first call."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    # The class refuses to rebind the name of a member, so the attribute comes before the entry in the member map.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


BORA: PeftType = _extend_peft_type("BORA")
RAVAN: PeftType = _extend_peft_type("RAVAN")
