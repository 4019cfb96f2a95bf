"""Damped linear algebra against numpy in float64, and what its errors promise."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from references import relative_error
from torch.utils.flop_counter import FlopCounterMode

from sogrid.factorize import (
    FactorizationError,
    eigenvectors,
    failures_are_nan,
    inverse_square_root,
    tikhonov_inverse,
    truncated,
)
from sogrid.structured import (
    Gram,
    ThinInverse,
    add_outer,
    mean_eigenvalue,
    shift_diagonal,
)

RTOL = 1e-12  # of the norm, float64 rounding times a condition number of at most 1e3


@pytest.fixture
def semidefinite(draw):
    """``semidefinite(*leading, m)``: Gram matrices [..., m, m] of rank m − 1, so damping is needed."""

    def make(*shape):
        h = draw(*shape, shape[-1] - 1)
        return h @ h.mT / shape[-1]

    return make


def numpy_inverse(matrix, damping):
    m = matrix.double().numpy()
    return torch.from_numpy(np.linalg.inv(m + damping * np.eye(m.shape[-1])))


def message_of(function, *arguments):
    with pytest.raises(FactorizationError) as caught:
        function(*arguments, "layer 'fc7'")
    return str(caught.value)


def advised(message):
    return float(re.search(r"a shift of (\S+) or more would have helped", message).group(1))


def with_spectrum(values, draw):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = np.linalg.qr(draw(len(values), len(values)).numpy())[0]
    matrix = q * np.asarray(values, dtype=float) @ q.T
    return torch.from_numpy((matrix + matrix.T) / 2)


# --- shift -----------------------------------------------------------------------------------------


def test_shift_diagonal_leaves_its_argument_alone(draw):
    matrix = draw(2, 3, 3)
    before = matrix.clone()
    shifted = shift_diagonal(matrix, 0.5)
    assert torch.equal(shifted, before + 0.5 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(matrix, before)


def test_shift_diagonal_takes_one_damping_for_each_leading_dimension(draw):
    """As many as matrices, more than matrices, and as many as rows, where a mistake would not raise."""
    identity = torch.eye(3, dtype=torch.float64)
    damping = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    for matrix in (draw(3, 3, 3), draw(3, 3)):
        expected = matrix + damping[:, None, None] * identity
        assert torch.equal(shift_diagonal(matrix, damping), expected)
    assert shift_diagonal(draw(5, 1, 3, 3), damping).shape == (5, 3, 3, 3)


# --- Tikhonov --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3, 4)], ids=str)
def test_tikhonov_inverse_is_numpys(semidefinite, shape, damping):
    matrix = semidefinite(*shape)
    expected = numpy_inverse(matrix, damping)
    before = matrix.clone()
    assert relative_error(tikhonov_inverse(matrix, damping), expected) < RTOL
    assert torch.equal(matrix, before)


def test_an_undamped_definite_matrix_is_simply_inverted(draw):
    matrix = with_spectrum([1.0, 2.0, 3.0], draw)
    assert relative_error(tikhonov_inverse(matrix, 0.0), numpy_inverse(matrix, 0.0)) < RTOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_may_be_a_0d_tensor_of_either_dtype(semidefinite, dtype):
    """A 0-d tensor says the same as the number, and never changes the dtype of the result."""
    matrix = semidefinite(4).to(dtype)
    expected = tikhonov_inverse(matrix, 0.25)
    for other in (torch.float32, torch.float64):
        inverse = tikhonov_inverse(matrix, torch.tensor(0.25, dtype=other))
        assert inverse.dtype == dtype
        assert torch.equal(inverse, expected)


def test_leading_dimensions_are_a_batch_of_single_problems(semidefinite):
    """Each with a damping of its own: the grid of hyperparameters."""
    matrix = semidefinite(3, 4)
    damping = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    batch = tikhonov_inverse(matrix, damping)
    for k in range(3):
        assert relative_error(batch[k], numpy_inverse(matrix[k], damping[k].item())) < RTOL
        root = inverse_square_root(matrix, damping)[k]
        assert relative_error(root @ root, batch[k]) < RTOL


def test_what_float32_cannot_factorise_float64_does():
    """1 + 1e-8 is 1 in float32, where the damped matrix of ones is therefore singular."""
    ones = torch.ones(3, 3)
    assert torch.linalg.cholesky_ex(shift_diagonal(ones, 1e-8))[1] != 0
    expected = numpy_inverse(ones, 1e-8)
    inverse = tikhonov_inverse(ones, 1e-8)
    assert inverse.dtype == torch.float32
    # condition 3e8 in float64 (1e-7), then rounding to float32 (6e-8)
    assert relative_error(inverse.double(), expected) < 1e-6


def test_float32_where_float32_is_enough(semidefinite):
    matrix = semidefinite(6).float()
    # float32 rounding times a condition number of about 30
    assert relative_error(tikhonov_inverse(matrix, 0.1).double(), numpy_inverse(matrix, 0.1)) < 1e-5


# --- thin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 6), (3, 20), (2, 3, 4, 9)], ids=str)
def test_a_thin_inverse_multiplies_as_the_matrix_does(draw, shape, damping):
    """From the left and from the right; its arguments are left alone."""
    gram, x = Gram(draw(*shape)), draw(*shape[:-2], shape[-1], 5)
    expected = numpy_inverse(gram.dense(), damping)
    rows, before = gram.rows.clone(), x.clone()
    thin = tikhonov_inverse(gram, damping)
    assert isinstance(thin, ThinInverse)
    assert relative_error(thin.dense(), expected) < RTOL
    assert relative_error(thin @ x, expected @ x) < RTOL
    assert relative_error(x.mT @ thin, x.mT @ expected) < RTOL
    assert torch.equal(gram.rows, rows)
    assert torch.equal(x, before)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 4, 9)], ids=str)
def test_the_inverse_of_a_cut_matrix_errs_by_the_first_direction_left_out(draw, shape, damping):
    """‖P_k − P‖₂ = σ/(δ(σ + δ))."""
    gram = Gram(draw(*shape))
    values = torch.linalg.eigvalsh(gram.dense()).flip(-1)
    whole = torch.linalg.inv(shift_diagonal(gram.dense(), damping))
    for rank in range(1, shape[-2]):
        for matrix in (gram, gram.dense()):
            cut = truncated(matrix, rank)
            assert cut.rows.shape[-2] == rank
            error = torch.linalg.matrix_norm(tikhonov_inverse(cut, damping).dense() - whole, 2)
            first = values[..., rank]
            assert relative_error(error, first / (damping * (first + damping))) < 1e-9


def test_a_cut_never_makes_a_product_dearer(draw):
    """Where it would, the matrix is left as it is."""
    whole = [Gram(draw(5, 9)), *(Gram(draw(9, m)).dense() for m in (4, 5, 9))]
    for matrix, rank in ((matrix, rank) for matrix in whole for rank in range(1, 10)):
        x, flops = draw(3, (matrix.rows if isinstance(matrix, Gram) else matrix).shape[-1]), []
        for inverse in (tikhonov_inverse(matrix, 0.1), tikhonov_inverse(matrix, 0.1, rank=rank)):
            with FlopCounterMode(display=False) as counter:
                x @ inverse
            flops.append(counter.get_total_flops())
        assert flops[1] <= flops[0]
        assert (flops[1] < flops[0]) == (truncated(matrix, rank) is not matrix)


def test_of_a_stack_only_what_is_not_finite_is_lost(draw):
    rows = draw(3, 2, 5)
    rows[1, 0, 0] = torch.nan
    with failures_are_nan():
        cut = truncated(Gram(rows), 1).rows
    assert bool(torch.isnan(cut[1]).all())
    for k in (0, 2):
        assert relative_error(Gram(cut[k]).dense(), truncated(Gram(rows[k]), 1).dense()) < RTOL


def test_a_matrix_that_is_not_finite_is_not_cut():
    for matrix in (Gram(torch.full((3, 5), torch.nan)), torch.full((5, 5), torch.inf)):
        with pytest.raises(FactorizationError, match="layer 'a': the matrix to factorise"):
            truncated(matrix, 2, "layer 'a'")


def test_thin_inverses_broadcast_over_leading_dimensions(draw):
    """One matrix with three dampings, three with one each, and products with more or fewer dimensions."""
    damping = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    for rows in (draw(2, 7), draw(3, 2, 7), draw(4, 1, 2, 7)):
        thin = tikhonov_inverse(Gram(rows), damping)
        dense = tikhonov_inverse(Gram(rows).dense(), damping)
        assert relative_error(thin.dense(), dense) < RTOL
        for x in (draw(5, 7), draw(3, 5, 7), draw(2, 1, 1, 5, 7)):
            assert relative_error(x @ thin, x @ dense) < RTOL
            assert relative_error(thin @ x.mT, dense @ x.mT) < RTOL
    thin, x = tikhonov_inverse(Gram(draw(2, 7)), 0.1), draw(3, 5, 7)
    assert relative_error(x @ thin, x @ thin.dense()) < RTOL


def test_a_thin_inverse_stays_in_the_dtype_of_its_rows(draw):
    rows = draw(2, 7)
    for dtype in (torch.float32, torch.float64):
        expected = tikhonov_inverse(Gram(rows.to(dtype)), 0.25)
        for other in (torch.float32, torch.float64):
            thin = tikhonov_inverse(Gram(rows.to(dtype)), torch.tensor(0.25, dtype=other))
            assert thin.factor.dtype == thin.shift.dtype == dtype
            assert all(map(torch.equal, thin, expected))


def test_rows_of_zeros_leave_the_damping():
    thin = tikhonov_inverse(Gram(torch.zeros(2, 5)), 0.5)
    assert torch.equal(thin.dense(), 2 * torch.eye(5))


def test_a_damping_that_float32_cannot_see_takes_the_dense_route_in_float64():
    rows = torch.ones(2, 5)  # RᵀR is 2 everywhere
    inverse = tikhonov_inverse(Gram(rows), 1e-8)
    assert torch.equal(inverse, tikhonov_inverse(2 * torch.ones(5, 5), 1e-8))
    assert isinstance(tikhonov_inverse(Gram(rows.double()), 1e-8), ThinInverse)
    assert isinstance(tikhonov_inverse(Gram(rows), 1e-5), ThinInverse)


def test_gram_matrices_are_added_to_and_traced_as_the_matrices_they_stand_for(draw):
    for leading in ((), (3,)):
        gram, vector = Gram(draw(*leading, 2, 7)), draw(*leading, 7)
        for weight in (0.3, torch.tensor(0.3, dtype=torch.float64)):
            found = add_outer(gram, vector, weight).dense()
            assert relative_error(found, add_outer(gram.dense(), vector, weight)) < RTOL
        assert relative_error(mean_eigenvalue(gram), mean_eigenvalue(gram.dense())) < RTOL
        values = torch.linalg.eigvalsh(gram.dense())
        assert relative_error(mean_eigenvalue(gram), values.mean(-1)) < RTOL


@pytest.mark.parametrize("damping", [0.0, torch.tensor(0.0), 1e-300, -0.5, torch.tensor(-0.5)], ids=str)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damping_lost_in_rounding_is_refused_and_the_one_named_works(draw, dtype, scale, damping):
    """Also where RRᵀ is definite without any: RᵀR never is. What the dense route does, happens."""
    for _ in range(10):
        gram = Gram((scale * draw(3, 8)).to(dtype))
        try:
            dense = tikhonov_inverse(gram.dense(), damping)
        except FactorizationError:
            message = message_of(tikhonov_inverse, gram, damping)
            assert message.startswith("layer 'fc7': ")
            thin = tikhonov_inverse(gram, advised(message))
            assert isinstance(thin, ThinInverse)
            assert bool(torch.isfinite(thin.dense()).all())
        else:  # rounding made it definite
            assert torch.equal(tikhonov_inverse(gram, damping), dense)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_thin_rows_that_are_not_finite_are_called_that(bad):
    for dtype in (torch.float32, torch.float64):
        rows = torch.ones(3, 2, 7, dtype=dtype)
        rows[1, 0, 3] = bad
        assert "NaN or infinite" in message_of(tikhonov_inverse, Gram(rows), 1.0)
    assert "damping, is NaN" in message_of(tikhonov_inverse, Gram(torch.ones(2, 7)), torch.tensor(torch.nan))


# --- errors ----------------------------------------------------------------------------------------

SPECTRA = {
    "indefinite": [-1.04, 0.5, 2.0],  # -1.04 rounded to two digits would not be enough
    "negative": [-3.0, -2.0, -1.0],
    "zero": [0.0, 0.0, 0.0],
    "singular": [0.0, 0.0, 1.0, 7.0],
    "nearly singular": [-1e-15, 1e-16, 1.0, 1e3],
    "one by one": [-2e-9],
}


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("function", [tikhonov_inverse, inverse_square_root])
def test_the_damping_that_the_error_names_works(draw, function, spectrum, scale):
    """Ten random bases each; where rounding makes a singular matrix definite there is no error to read."""
    read = 0
    for _ in range(10):
        matrix = scale * with_spectrum(SPECTRA[spectrum], draw)
        for candidate in (matrix, matrix.float()):
            try:
                function(candidate, 0.0)
            except FactorizationError as error:
                read += 1
                shift = advised(str(error))
                assert bool(torch.isfinite(function(candidate, shift)).all())
                # not more than the smallest eigenvalue and rounding ask for
                size = max(abs(v) for v in SPECTRA[spectrum]) * scale
                slack = 1e3 * torch.finfo(candidate.dtype).eps * size + 1e-37
                assert shift < 1.2 * max(0.0, -min(SPECTRA[spectrum])) * scale + slack
    assert read > 0


def test_the_advice_holds_for_the_worst_matrix_of_a_batch_and_counts_the_damping_in_use(draw):
    batch = torch.stack([with_spectrum(v, draw) for v in ([1.0, 2.0], [-5.0, 1.0], [-0.1, 1e3])])
    for damping in (1.0, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)):
        shift = advised(message_of(tikhonov_inverse, batch, damping))
        assert 5.0 < shift < 6.0
        tikhonov_inverse(batch, shift)


@pytest.mark.parametrize("function", [tikhonov_inverse, inverse_square_root])
def test_the_error_names_the_matrix_and_its_damping(draw, function):
    matrix = with_spectrum([-1.0, 1.0], draw)
    message = message_of(function, matrix, 0.125)
    assert message.startswith("layer 'fc7': ")
    assert "0.125" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(1, 1), (2, 0)], ids=["diagonal", "off-diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [tikhonov_inverse, inverse_square_root])
def test_what_is_not_finite_is_called_that(function, dtype, where, bad):
    """An infinite diagonal passes LAPACK's Cholesky in float64, and its inverse would look harmless."""
    matrix = torch.eye(3, dtype=dtype)
    matrix[where] = matrix[where[::-1]] = bad
    message = message_of(function, torch.stack([torch.eye(3, dtype=dtype), matrix]), 1.0)
    assert message.startswith("layer 'fc7'")
    assert "NaN or infinite" in message
    assert "helped" not in message


def test_a_damping_that_is_not_a_number_is_not_blamed_on_the_matrix():
    assert "damping, is NaN" in message_of(tikhonov_inverse, torch.eye(2), torch.tensor(torch.nan))


# --- inverse square root ---------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_inverse_square_root(semidefinite, leading):
    """Symmetric, positive definite, and squares to the inverse."""
    matrix = semidefinite(*leading, 5)
    root = inverse_square_root(matrix, 0.1)
    assert relative_error(root @ root, numpy_inverse(matrix, 0.1)) < RTOL
    assert relative_error(root, root.mT) < RTOL
    assert np.linalg.eigvalsh(root.numpy()).min() > 0


def test_inverse_square_root_of_a_diagonal():
    matrix = torch.diag(torch.tensor([3.0, 8.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1 / 2, 1 / 3], dtype=torch.float64))
    assert relative_error(inverse_square_root(matrix, 1.0), expected) < RTOL


# --- eigenvectors ----------------------------------------------------------------------------------


@pytest.fixture
def unreliable(monkeypatch):
    """``unreliable(k)``: the first k eigendecompositions do not converge, or give what is not a number."""

    def make(times, silent=False):
        found, calls = torch.linalg.eigh, []

        def eigh(matrix):
            calls.append(matrix)
            if len(calls) > times:
                return found(matrix)
            if not silent:
                raise torch.linalg.LinAlgError("failed to converge")
            values, vectors = found(matrix)
            return values, torch.where(vectors == vectors.max(), torch.nan, vectors)

        monkeypatch.setattr("torch.linalg.eigh", eigh)

    return make


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize(("failures", "silent"), [(0, False), (1, False), (3, False), (1, True), (3, True)])
def test_eigenvectors_that_were_not_found_at_once(draw, unreliable, leading, failures, silent):
    """Of low rank, with many zeros, where LAPACK does not always converge; a shift within rounding helps."""
    rows = draw(*leading, 4, 9) * (torch.arange(9) % 2)
    matrix = rows.mT @ rows
    unreliable(failures, silent)
    basis = eigenvectors(Gram(rows))
    along = basis.mT @ matrix @ basis
    assert relative_error(along, torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))) < RTOL
    assert relative_error(basis @ along @ basis.mT, matrix) < RTOL
    assert relative_error(basis.mT @ basis, torch.eye(9).double().expand_as(matrix)) < RTOL
    thin = truncated(matrix, 4).rows
    assert relative_error(thin.mT @ thin, matrix) < RTOL


@pytest.mark.parametrize(("silent", "why"), [(False, "converge"), (True, "not finite")])
@pytest.mark.parametrize("function", [eigenvectors, partial(inverse_square_root, damping=1.0)])
def test_eigenvectors_that_are_not_found(draw, unreliable, silent, why, function):
    unreliable(99, silent)
    rows = draw(3, 3)
    with pytest.raises(FactorizationError, match=f"layer 'a': no eigenvectors were found.*{why}"):
        function(rows @ rows.mT, name="layer 'a'")
