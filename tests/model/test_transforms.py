import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.media.crop import crop_box, resize_crop
from fastav.model.transforms import mask_bands, mix, normalise_frames, normalise_mel


def picture(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "crop", "size"),
    [
        (120, 160, (10.4, 5.6, 100.0, 80.2), 64),
        (90, 64, (0.0, 0.0, 64.0, 90.0), 96),
        (33, 47, (46.0, 32.0, 1.0, 1.0), 8),
        (240, 320, (0.0, 0.0, 320.0, 240.0), 32),
    ],
)
def test_resize_crop_is_torchvisions(height: int, width: int, crop: tuple[float, ...], size: int, flip: bool) -> None:
    frames_THWC = picture(3, height, width)
    got = resize_crop(frames_THWC, crop, flip, size)
    left, top, right, bottom = crop_box(crop, height, width)
    source = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).double()
    box = (top, left, bottom - top, right - left)
    expected = tv.resized_crop(source, *box, [size, size], antialias=True).round().clamp(0, 255)
    expected = expected.flip(-1) if flip else expected
    assert got.dtype == torch.uint8
    assert got.shape == (3, 3, size, size)
    assert got.is_contiguous()
    assert (got.double() - expected).abs().max() <= 1
    assert torch.equal(got, resize_crop(torch.from_numpy(frames_THWC), crop, flip, size))


def test_resize_crop_takes_turned_frames_and_keeps_what_needs_no_resize() -> None:
    frames_THWC = picture(2, 20, 30)
    turned = np.rot90(frames_THWC, -1, axes=(1, 2))  # a view with a negative stride
    got = resize_crop(turned, (0, 0, 20, 20), False, 20)
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), turned[:, :20, :20])


def test_same_crop_for_every_frame_and_any_thread_count() -> None:
    one = picture(1, 50, 60)
    many = np.repeat(one, 4, axis=0)
    got = resize_crop(many, (3, 4, 40, 40), True, 16)
    assert (got == got[:1]).all()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(got, resize_crop(many, (3, 4, 40, 40), True, 16))
    finally:
        torch.set_num_threads(before)


@given(
    x=st.floats(-5, 200),
    y=st.floats(-5, 200),
    w=st.floats(0, 300),
    h=st.floats(0, 300),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
)
def test_crop_box_is_inside(x: float, y: float, w: float, h: float, height: int, width: int) -> None:
    left, top, right, bottom = crop_box((x, y, w, h), height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crop_box_rounds_edges_not_sizes() -> None:
    assert crop_box((1.2, 0.4, 9.0, 10.0), 100, 100) == (2, 0, 10, 10)
    assert crop_box((0.0, 0.0, 97.0, 53.0), 53, 97) == (0, 0, 97, 53)
    assert crop_box((96.4, 52.0, 0.1, 0.1), 53, 97) == (96, 52, 97, 53)
    assert crop_box((3.0, 3.0, 0.5, 0.5), 64, 64) == (4, 4, 6, 6)
    assert crop_box((0.0, 0.0, 640.0, 360.0), 360, 640) == (0, 0, 640, 360)


def test_normalise_frames_by_naive_loop() -> None:
    frames = torch.from_numpy(picture(2, 4, 5)).permute(0, 3, 1, 2)[None].contiguous()
    mean_C, std_C = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    got = normalise_frames(frames, mean_C, std_C)
    for t in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    value = (int(frames[0, t, c, y, x]) / 255 - float(mean_C[c])) / float(std_C[c])
                    assert float(got[0, t, c, y, x]) == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert normalise_frames(frames, mean_C, std_C, torch.bfloat16).dtype == torch.bfloat16


def test_normalise_mel() -> None:
    mel = torch.randn(2, 1, 1, 3, 4)
    torch.testing.assert_close(normalise_mel(mel, -40.0, 20.0), (mel + 40) / 20)
    assert normalise_mel(torch.tensor(-40.0), torch.tensor(-40.0), torch.tensor(20.0)) == 0


def test_mask_bands_by_naive_loop() -> None:
    mel = torch.randn(4, 2, 1, 10, 3)
    band = torch.tensor([[0, 0], [2, 5], [7, 15], [0, 10]])
    got = mask_bands(mel, band)
    for b in range(4):
        for m in range(10):
            masked = band[b, 0] <= m < band[b, 0] + band[b, 1]
            assert torch.equal(got[b, :, :, m], torch.zeros(2, 1, 3) if masked else mel[b, :, :, m])
    assert not torch.equal(mel, got)  # the input is left alone


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 7), dims=st.integers(0, 3))
def test_mix_by_naive_loop(seed: int, rows: int, dims: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *[2] * dims, generator=generator, dtype=torch.float64)
    mix_B = torch.rand(rows, generator=generator, dtype=torch.float64)
    mix_B[0] = 1
    partner_B = torch.randint(rows, (rows,), generator=generator)
    got = mix(x, mix_B, partner_B)
    for b in range(rows):
        expected = mix_B[b] * x[b] + (1 - mix_B[b]) * x[partner_B[b]]
        torch.testing.assert_close(got[b], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[0], x[0])


def test_mix_keeps_the_dtype_of_what_is_mixed() -> None:
    x = torch.randn(2, 3).bfloat16()
    assert mix(x, torch.tensor([0.3, 0.7]), torch.tensor([1, 0])).dtype == torch.bfloat16


def test_one_graph_without_breaks() -> None:
    def first_operation(
        frames: torch.Tensor,
        mel: torch.Tensor,
        band: torch.Tensor,
        mix_B: torch.Tensor,
        partner: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean_C, std_C = torch.full((3,), 0.5), torch.full((3,), 0.25)
        video = mix(normalise_frames(frames, mean_C, std_C), mix_B, partner)
        audio = mix(mask_bands(normalise_mel(mel, -40.0, 20.0), band), mix_B, partner)
        return video, audio

    inputs = (
        torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8),
        torch.randn(2, 1, 1, 10, 6),
        torch.tensor([[1, 2], [0, 0]]),
        torch.tensor([0.3, 1.0]),
        torch.tensor([1, 0]),
    )
    compiled = torch.compile(first_operation, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(*inputs), first_operation(*inputs), strict=True):
        assert torch.equal(got, expected)
