import pytest
import torch

from scanlib.decoders import ConvolutionalDecoder, ResidualModule, TransformerDecoder, choose_head_count


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
@pytest.mark.parametrize(
    ("channels", "grid", "size", "stride", "out"),
    [
        (32, (8, 8), (64, 64), None, (32, 32)),
        (32, (8, 8), (64, 64), 1, (64, 64)),
        (32, (8, 8), (64, 64), 8, (8, 8)),
        (16, (7, 7), (224, 224), None, (28, 28)),
        (16, (13, 13), (224, 224), 1, (208, 208)),
        (16, (4, 6), (64, 96), None, (16, 24)),
    ],
)
def test_output_shapes(channels, grid, size, stride, out, upsampling):
    decoder = ConvolutionalDecoder(channels, grid, size, output_stride=stride, upsampling=upsampling)
    assert decoder(torch.randn(2, channels, *grid)).shape == (2, 4, *out)
    decoder = TransformerDecoder(channels, grid, size, prefix=1, output_stride=stride, upsampling=upsampling, depth=1)
    assert decoder(torch.randn(2, 1 + grid[0] * grid[1], channels)).shape == (2, 4, *out)


def test_widths_are_the_published_ones_for_512_channels_and_scaled_for_fewer():
    widths = lambda decoder: [level.up.in_channels for level in decoder.up]  # noqa: E731 - each level's input width
    assert widths(ConvolutionalDecoder(512, (7, 7), (224, 224), output_stride=1)) == [512, 384, 256, 192, 128]
    assert widths(ConvolutionalDecoder(2048, (7, 7), (224, 224), output_stride=1)) == [512, 384, 256, 192, 128]
    assert widths(ConvolutionalDecoder(256, (7, 7), (224, 224), output_stride=1)) == [256, 192, 128, 96, 64]
    assert widths(ConvolutionalDecoder(64, (7, 7), (224, 224), (192, 256, 384, 512), 1)) == [512, 384, 256, 192, 128]


def test_transformer_decoder_has_the_published_widths_for_256_channels():
    widths = lambda decoder: [decoder.project.out_channels, *(level.up[0].out_channels for level in decoder.up)]  # noqa: E731
    assert widths(TransformerDecoder(256, (14, 14), (224, 224), depth=1)) == [384, 256, 192]
    assert widths(TransformerDecoder(128, (8, 8), (64, 64), depth=1)) == [128, 96, 64]
    convolutional = ConvolutionalDecoder(128, (8, 8), (64, 64), upsampling="bilinear", full_widths_from=256)
    assert widths(convolutional) == [128, 96, 64]


def test_all_parameters_exist_before_the_first_forward_and_get_gradients():
    decoder = ConvolutionalDecoder(24, (8, 8), (64, 64))
    parameters = list(decoder.parameters())
    decoder(torch.randn(2, 24, 8, 8)).square().mean().backward()
    assert len(list(decoder.parameters())) == len(parameters)
    assert all(parameter.grad is not None for parameter in parameters)
    module = ResidualModule(8, 16)
    assert module.shortcut.weight.shape == (16, 8, 1, 1)


def test_head_count_divides_the_width():
    assert [choose_head_count(width) for width in (768, 192, 128, 100, 7, 1)] == [12, 12, 8, 10, 7, 1]
    TransformerDecoder(100, (4, 4), (32, 32), depth=1)(torch.randn(1, 16, 100))


def test_prefix_tokens_change_the_output_but_are_not_part_of_the_grid():
    torch.manual_seed(0)
    decoder = TransformerDecoder(16, (4, 4), (32, 32), prefix=2, depth=1).eval()
    tokens = torch.randn(1, 18, 16)
    changed = tokens.clone()
    changed[:, 0] += 5
    assert decoder(tokens).shape == (1, 4, 16, 16)
    assert not torch.allclose(decoder(tokens), decoder(changed))


def test_prefix_tokens_are_the_first_tokens():
    torch.manual_seed(0)
    decoder = TransformerDecoder(16, (4, 4), (32, 32), prefix=2, depth=1).eval()
    decoder.blocks = torch.nn.Identity()
    tokens = torch.randn(1, 18, 16)
    changed = tokens.clone()
    changed[:, :2] = 9
    assert torch.equal(decoder(tokens), decoder(changed))


def test_level_has_a_skip_connection():
    decoder = ConvolutionalDecoder(16, (4, 4), (16, 16))
    level, x = decoder.up[0].eval(), torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(level(x), level.up(x + level.blocks(x)))


def test_decoders_raise_for_wrong_arguments():
    with pytest.raises(ValueError, match="output_stride must be one of 1, 2, 4, 8, or None for four times the grid, got 3"):
        ConvolutionalDecoder(8, (8, 8), (64, 64), output_stride=3)
    with pytest.raises(ValueError, match="output_stride must be one of .*, got 16"):
        ConvolutionalDecoder(8, (8, 8), (64, 64), output_stride=16)
    with pytest.raises(ValueError, match="upsampling must be 'bilinear' or 'transposed', got 'nearest'"):
        ConvolutionalDecoder(8, (8, 8), (64, 64), upsampling="nearest")
