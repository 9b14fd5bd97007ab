"""Which address and network device of this machine others see."""

from __future__ import annotations

import pytest

from asyncgrpo.wire.address import device_of, own_address


def test_the_way_to_this_machine_itself_is_over_loopback() -> None:
    assert own_address("127.0.0.1", 9) == "127.0.0.1"
    assert device_of("127.0.0.1") == "lo"


def test_an_address_that_no_device_has_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"no network device has the address 198\.51\.100\.7"):
        device_of("198.51.100.7")
