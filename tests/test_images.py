"""One decoder for whatever stands in a data set: right pixels, or UnreadableImageError, and nothing else."""

import errno
import io

import numpy as np
import pytest
from conftest import encoded_image
from PIL import Image, ImageOps, features

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import StorageError


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(size=(24, 16)):
    """No two of its pixels' neighbourhoods are alike, so that every turn and mirroring shows."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([across, down, across * 0], axis=-1).astype(np.uint8))


def test_whatever_a_decoder_raises_is_an_unreadable_image(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded_image())
    for error in (
        RuntimeError("decoder"),
        NotImplementedError(),
        AttributeError("x"),
        KeyError(3),
        ZeroDivisionError(),
    ):

        def broken(self, error=error):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("PIL.ImageFile.ImageFile.load", broken)
            with pytest.raises(UnreadableImageError, match=rf"a\.png: {type(error).__name__}"):
                decode_rgb(str(path))


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_what_is_not_the_images_fault_is_raised_as_it_is(monkeypatch, error):
    def broken(self):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
    with pytest.raises(type(error)):
        decode_rgb(encoded_image())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_failing_disk_makes_no_image_unreadable(monkeypatch, number):
    def broken(*_):
        raise OSError(number, "storage")

    monkeypatch.setattr("PIL.Image.open", broken)
    with pytest.raises(StorageError, match=r"could not read a\.png"):
        decode_rgb("a.png")
    with pytest.raises(UnreadableImageError):
        decode_rgb(b"bytes were read already")


def test_a_pointer_of_git_lfs_is_told_from_an_image(tmp_path):
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / "a.png").write_bytes(content)
    for cell in (content, str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        with pytest.raises(UnreadableImageError, match=r"Git LFS's pointer .* run git lfs pull"):
            decode_rgb(cell)


@pytest.mark.parametrize(
    "cell", [{"bytes": 5, "path": None}, {"bytes": [1], "path": None}, "a\0b", "/", {"path": "\udcff"}]
)
def test_what_is_no_image_at_all_is_unreadable_too(cell):
    with pytest.raises(UnreadableImageError):
        decode_rgb(cell)


def test_the_message_names_the_file(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    for cell in (str(path), {"bytes": None, "path": str(path)}, {"bytes": b"no", "path": str(path)}):
        with pytest.raises(UnreadableImageError, match=r"broken\.png: UnidentifiedImageError"):
            decode_rgb(cell)
    with pytest.raises(UnreadableImageError, match="there is no image"):
        decode_rgb({"bytes": None, "path": None})


# --- orientation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_applied_as_pillow_does(format, orientation):
    if format in ("WEBP", "AVIF") and not features.check(format.lower()):
        pytest.skip(f"this Pillow has no {format}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture(), format, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(decode_rgb(content)), np.asarray(expected))


def with_exif(exif):
    """A PNG with these bytes as its EXIF chunk."""
    return saved(picture(), "PNG", exif=exif)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 24,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0six\0\0\0\0\0",  # a text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x0c\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",  # far outside
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x03\0\0\0\x06\0\x06\0\x06\0\0\0\0",  # three of them
        b"not exif at all",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_metadata_leave_a_good_image_as_it_is(exif):
    assert np.array_equal(np.asarray(decode_rgb(with_exif(exif))), np.asarray(picture()))


def test_metadata_that_cannot_be_written_again_do_not_matter():
    """A description that is a fraction: to turn an image by rewriting its EXIF fails there."""
    entries = [b"\x0e\x01\x0a\0\x01\0\0\0\x12\0\0\0", b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"]
    content = with_exif(b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(entries) + bytes(40))
    expected = picture().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode_rgb(content)), np.asarray(expected))


# --- pixels --------------------------------------------------------------------------------------------

GREY = np.array([[0, 64, 128, 255], [1, 2, 254, 200]], np.uint8)


def grey(content):
    image = decode_rgb(content)
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.float32) / 255,
        GREY.astype(np.float32),
        GREY.astype(np.int32),
        GREY.astype(np.int32) * 257,
        GREY.astype(np.uint16) * 257,
    ],
    ids=["floats to 1", "floats to 255", "integers to 255", "integers to 65,535", "16 bits"],
)
def test_values_of_more_than_8_bits_are_scaled_by_the_white_that_they_fit(values):
    assert np.array_equal(grey(saved(Image.fromarray(values), "TIFF")), GREY)


def test_16_bits_of_png_and_pgm_are_never_taken_for_8():
    dark = np.full((2, 4), 200, np.uint16)
    assert grey(saved(Image.fromarray(dark), "PNG")).max() == 0
    assert grey(b"P5 4 2 65535\n" + dark.astype(">u2").tobytes()).max() == 0
    assert np.array_equal(grey(b"P5 4 2 65535\n" + (GREY.astype(">u2") * 257).tobytes()), GREY)


def test_floats_may_pass_black_and_white_a_little():
    values = GREY.astype(np.float32) / 255
    values[0, 0], values[0, 3] = -0.05, 1.08  # as a sharp resize leaves them
    assert np.array_equal(grey(saved(Image.fromarray(values), "TIFF")), GREY)


@pytest.mark.parametrize("scale", [3.0, 1000.0, -1.0, np.nan, np.inf])
def test_floats_of_unknown_range_are_unreadable(scale):
    values = GREY.astype(np.float32) / 255 * np.float32(scale)
    with pytest.raises(UnreadableImageError, match="its 32-bit values go from"):
        decode_rgb(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("scale", [4, 1_000_000, -1])
def test_integers_of_unknown_range_are_unreadable(scale):
    with pytest.raises(UnreadableImageError, match="its 32-bit values go from"):
        decode_rgb(saved(Image.fromarray(GREY.astype(np.int32) * scale), "TIFF"))


def test_black_is_black_in_every_mode():
    for dtype in (np.uint8, np.uint16, np.int32, np.float32):
        assert grey(saved(Image.fromarray(np.zeros((2, 2), dtype)), "TIFF")).max() == 0


def test_an_image_whose_format_forgets_its_palette_is_read():
    decode_rgb(saved(picture().convert("P"), "ICNS"))


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        content = saved(
            frames[0], format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {}
        )
        assert decode_rgb(content).getpixel((0, 0)) == (255, 0, 0), format


def test_a_palette_with_transparency_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for format, transparency in (("PNG", bytes([0, 255])), ("GIF", 0)):
        decoded = decode_rgb(saved(image, format, transparency=transparency))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)], format
