"""Triton kernels of a decoder layer: norms, and the low-rank products with what follows them.

Each frozen product is cuBLAS's; one kernel then adds every lane's h B to it and does what comes next on the way:
turns queries and keys by their positions, multiplies the gate in, adds the residual.

Shapes: N rows, D hidden size, I inner size of the feed-forward part, H hidden columns of a group, L lanes.
"""

import triton
import triton.language as tl


@triton.jit
def _codes(values, codes, scales, row, where, mask, inside):
    """Keeps rows [ROWS, WIDTH] as 8-bit floats with a scale each."""
    most = tl.maximum(tl.max(tl.abs(values), 1) / 448.0, 1e-12)
    tl.store(scales + row, most, mask=inside)
    tl.store(codes + where, (values / most[:, None]).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def quantise(x, codes, scales, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows of x [N, I] as 8-bit floats with a scale [N] each: the largest value of a row is the largest code."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    most = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        mask = inside[:, None] & (c[None, :] < width)
        values = tl.load(x + row[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(values), 1))
    most = tl.maximum(most / 448.0, 1e-12)
    tl.store(scales + row, most, mask=inside)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        mask = inside[:, None] & (c[None, :] < width)
        where = row[:, None] * width + c[None, :]
        values = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(codes + where, (values / most[:, None]).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def norm(
    x, weight, y, inverse, codes, scales, rows, width, eps, CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """y = weight * x / rms(x), rounded before it is weighed; keeps 1 / rms [N], and y as 8-bit floats where CODES."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    mask = (row[:, None] < rows) & (c[None, :] < width)
    where = row[:, None] * width + c[None, :]
    values = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / width + eps)
    normal = (values * scale[:, None]).to(y.dtype.element_ty)
    gain = tl.load(weight + c, mask=c < width, other=0.0)
    found = (normal * gain[None, :]).to(y.dtype.element_ty)
    tl.store(y + where, found, mask=mask)
    tl.store(inverse + row, scale, mask=row < rows)
    if CODES:
        _codes(found.to(tl.float32), codes, scales, row, where, mask, row < rows)


@triton.jit
def norm_back(
    dy, x, inverse, weight, upstream, dx, codes, scales, rows, width,
    CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx = upstream + the gradient of x from dy; also as 8-bit floats where CODES."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    mask = (row[:, None] < rows) & (c[None, :] < width)
    where = row[:, None] * width + c[None, :]
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    normal = tl.load(x + where, mask=mask, other=0.0).to(tl.float32) * scale
    gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
    gradient = tl.load(dy + where, mask=mask, other=0.0).to(tl.float32) * gain[None, :]
    mean = tl.sum(normal * gradient, 1) / width
    total = tl.load(upstream + where, mask=mask, other=0.0).to(tl.float32) + scale * (gradient - normal * mean[:, None])
    found = total.to(dx.dtype.element_ty)
    tl.store(dx + where, found, mask=mask)
    if CODES:
        _codes(found.to(tl.float32), codes, scales, row, where, mask, row < rows)


@triton.jit
def _place(share, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The lane of a program, and how many tiles of rows of it lie before the program's SPAN."""
    programs = tl.cdiv(share, ROWS * SPAN)
    return tl.program_id(0) // programs, tl.program_id(0) % programs * SPAN


@triton.jit
def _rows(share, lane, tile, ROWS: tl.constexpr):
    """Rows of a tile of a lane, and which of them the lane has."""
    local = tile * ROWS + tl.arange(0, ROWS)
    return lane.to(tl.int64) * share + local, local < share


@triton.jit
def _matrix(flat, entry, live, first, c, width, known, B_SIDE: tl.constexpr, RANKS: tl.constexpr):
    """Columns c of ranks from `first` on of A or B [RANKS, COLS]; zeros beyond the rank that there is."""
    rank = tl.load(entry, mask=live, other=0)
    if B_SIDE:
        offset = tl.multiple_of(tl.load(entry + 2, mask=live, other=0), 16)
    else:
        offset = tl.multiple_of(tl.load(entry + 1, mask=live, other=0), 16)
    r = first + tl.arange(0, RANKS)
    return tl.load(
        flat + offset + r[:, None] * width + c[None, :], mask=(r[:, None] < rank) & known[None, :], other=0.0
    )


@triton.jit
def _hidden(h, entry, live, first, row, inside, h_stride, RANKS: tl.constexpr):
    """Hidden values of these rows [ROWS, RANKS]; zeros beyond the rank that there is."""
    rank = tl.load(entry, mask=live, other=0)
    where = tl.multiple_of(tl.load(entry + 3, mask=live, other=0), 16)
    r = first + tl.arange(0, RANKS)
    return tl.load(
        h + row[:, None] * h_stride + where + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0.0
    )


@triton.jit
def _add(
    total, matrix, h, flat, entry, live, row, inside, c, width, known, h_stride,
    B_SIDE: tl.constexpr, RANKS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """total [ROWS, COLS] += h times columns c of A or B; where HOIST, `matrix` is all there is of them."""
    if HOIST:
        hidden = _hidden(h, entry, live, 0, row, inside, h_stride, RANKS)
        total = tl.dot(hidden, matrix.to(hidden.dtype), total, input_precision="ieee")
    else:
        for first in range(0, tl.load(entry, mask=live, other=0), RANKS):
            hidden = _hidden(h, entry, live, first, row, inside, h_stride, RANKS)
            other = _matrix(flat, entry, live, first, c, width, known, B_SIDE, RANKS)
            total = tl.dot(hidden, other.to(hidden.dtype), total, input_precision="ieee")
    return total


@triton.jit
def turn(
    h, flat, table, lanes, y, starts, cosines, sines, share, stride, h_stride,
    ADAPTED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values [N, heads] += h B, and queries and keys turned by their rows' positions; in place."""
    lane, before = _place(share, ROWS, SPAN)
    head = tl.program_id(1)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    low = tl.arange(0, HALF)
    known = low < HALF
    member = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
    width = tl.where(member == 0, HEADS, KV_HEADS) * (2 * HALF)
    others = tl.where(member == 0, 0, tl.where(member == 1, HEADS, HEADS + KV_HEADS))
    entry = table + (slot * 3 + member) * 4
    c = (head - others) * (2 * HALF) + low
    lower = 0
    upper = 0
    if ADAPTED and HOIST:
        lower = _matrix(flat, entry, live, 0, c, width, known, True, RANKS)
        upper = _matrix(flat, entry, live, 0, c + HALF, width, known, True, RANKS)
    turned = head < HEADS + KV_HEADS
    dtype = y.dtype.element_ty
    for tile in tl.range(0, SPAN, num_stages=3):
        row, inside = _rows(share, lane, before + tile, ROWS)
        mask = inside[:, None] & known[None, :]
        place = y + row[:, None] * stride + head * (2 * HALF) + low[None, :]
        first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
        position = row - tl.load(starts + row, mask=inside, other=0)
        if ADAPTED:
            first = _add(
                first, lower, h, flat, entry, live, row, inside, c, width, known, h_stride, True, RANKS, HOIST
            )  # fmt: skip
            second = _add(
                second, upper, h, flat, entry, live, row, inside, c + HALF, width, known, h_stride, True, RANKS, HOIST
            )  # fmt: skip
        angle = position[:, None] * HALF + low[None, :]
        cosine = tl.load(cosines + angle, mask=mask & turned, other=1.0).to(tl.float32)
        sine = tl.load(sines + angle, mask=mask & turned, other=0.0).to(tl.float32)
        first = first.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
        tl.store(place, (first * cosine - second * sine).to(dtype), mask=mask)
        tl.store(place + HALF, (second * cosine + first * sine).to(dtype), mask=mask)


@triton.jit
def close_gate(
    h, flat, table, lanes, y, out, share, width, h_stride,
    ADAPTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    HOIST: tl.constexpr,
):  # fmt: skip
    """Gate and up [N, 2 I] += h B, in place; out [N, I] = silu(gate) * up."""
    lane, before = _place(share, ROWS, SPAN)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < width
    entry = table + slot * 2 * 4
    first = 0
    second = 0
    changed = live
    if ADAPTED:
        changed = live & (tl.load(entry, mask=live, other=0) + tl.load(entry + 4, mask=live, other=0) > 0)
        if HOIST:
            first = _matrix(flat, entry, live, 0, c, width, known, True, RANKS)
            second = _matrix(flat, entry + 4, live, 0, c, width, known, True, RANKS)
    dtype = y.dtype.element_ty
    for tile in tl.range(0, SPAN, num_stages=3):
        row, inside = _rows(share, lane, before + tile, ROWS)
        mask = inside[:, None] & known[None, :]
        place = y + row[:, None] * (2 * width) + c[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
        if ADAPTED:
            gate = _add(gate, first, h, flat, entry, live, row, inside, c, width, known, h_stride, True, RANKS, HOIST)
            up = _add(up, second, h, flat, entry + 4, live, row, inside, c, width, known, h_stride, True, RANKS, HOIST)
            tl.store(place, gate.to(dtype), mask=mask & changed)
            tl.store(place + width, up.to(dtype), mask=mask & changed)
            gate = gate.to(dtype).to(tl.float32)
            up = up.to(dtype).to(tl.float32)
        opened = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        tl.store(out + row[:, None] * width + c[None, :], (opened * up).to(dtype), mask=mask)


@triton.jit
def open_gate(
    dh, flat, table, lanes, y, dout, dy, share, width, h_stride,
    ADAPTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    HOIST: tl.constexpr,
):  # fmt: skip
    """dy [N, 2 I], the gradients of gate and up, from that of silu(gate) * up, which is dout [N, I] + dh A."""
    lane, before = _place(share, ROWS, SPAN)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < width
    entry = table + slot * 4
    matrix = 0
    if ADAPTED and HOIST:
        matrix = _matrix(flat, entry, live, 0, c, width, known, False, RANKS)
    dtype = dy.dtype.element_ty
    for tile in tl.range(0, SPAN, num_stages=3):
        row, inside = _rows(share, lane, before + tile, ROWS)
        mask = inside[:, None] & known[None, :]
        total = tl.load(dout + row[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
        place = row[:, None] * (2 * width) + c[None, :]
        gate = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y + place + width, mask=mask, other=0.0).to(tl.float32)
        if ADAPTED:
            total = _add(
                total, matrix, dh, flat, entry, live, row, inside, c, width, known, h_stride, False, RANKS, HOIST
            )  # fmt: skip
            total = total.to(dtype).to(tl.float32)
        opened = tl.sigmoid(gate)
        tl.store(dy + place, (total * up * opened * (1 + gate * (1 - opened))).to(dtype), mask=mask)
        tl.store(dy + place + width, (total * gate * opened).to(dtype), mask=mask)


@triton.jit
def expand_norm_back(
    dh, flat, table, lanes, dy, x, inverse, weight, upstream, dx, codes, scales, share, width, h_stride,
    M: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """`norm_back` of dy + the sum over members of dh A, for rows that fit into a tile."""
    lane, tile = _place(share, ROWS, 1)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    row, inside = _rows(share, lane, tile, ROWS)
    c = tl.arange(0, WIDTH)
    known = c < width
    mask = inside[:, None] & known[None, :]
    where = row[:, None] * width + c[None, :]
    gradient = tl.load(dy + where, mask=mask, other=0.0).to(tl.float32)
    for member in range(M):
        entry = table + (slot * M + member) * 4
        for first in range(0, tl.load(entry, mask=live, other=0), RANKS):
            hidden = _hidden(dh, entry, live, first, row, inside, h_stride, RANKS)
            matrix = _matrix(flat, entry, live, first, c, width, known, False, RANKS)
            gradient = tl.dot(hidden, matrix.to(hidden.dtype), gradient, input_precision="ieee")
    gradient = gradient.to(dy.dtype.element_ty).to(tl.float32)
    scale = tl.load(inverse + row, mask=inside, other=0.0)[:, None]
    normal = tl.load(x + where, mask=mask, other=0.0).to(tl.float32) * scale
    gradient *= tl.load(weight + c, mask=known, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(normal * gradient, 1) / width
    total = tl.load(upstream + where, mask=mask, other=0.0).to(tl.float32) + scale * (gradient - normal * mean[:, None])
    found = total.to(dx.dtype.element_ty)
    tl.store(dx + where, found, mask=mask)
    if CODES:
        _codes(found.to(tl.float32), codes, scales, row, where, mask, inside)


@triton.jit
def add_on(
    h, flat, table, lanes, x, y, out, share, width, h_stride,
    ADAPTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    HOIST: tl.constexpr,
):  # fmt: skip
    """out [N, D] = x + y + h B."""
    lane, before = _place(share, ROWS, SPAN)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = c < width
    entry = table + slot * 4
    matrix = 0
    if ADAPTED and HOIST:
        matrix = _matrix(flat, entry, live, 0, c, width, known, True, RANKS)
    dtype = out.dtype.element_ty
    for tile in tl.range(0, SPAN, num_stages=3):
        row, inside = _rows(share, lane, before + tile, ROWS)
        mask = inside[:, None] & known[None, :]
        where = row[:, None] * width + c[None, :]
        total = tl.load(y + where, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
        if ADAPTED:
            total = _add(
                total, matrix, h, flat, entry, live, row, inside, c, width, known, h_stride, True, RANKS, HOIST
            )  # fmt: skip
            total = total.to(dtype).to(tl.float32)
        tl.store(out + where, (total + residual).to(dtype), mask=mask)


@triton.jit
def head_gradients(
    dh, flat, table, lanes, dout, out, products, rows, share, width, h_stride,
    ADAPTED: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
    HOIST: tl.constexpr,
):  # fmt: skip
    """dout [N, heads] += dh A, in place; products [heads, N] = the sum over a head of dout * out."""
    lane, before = _place(share, ROWS, SPAN)
    head = tl.program_id(1)
    slot = tl.load(lanes + lane)
    live = slot >= 0
    c = head * HEAD + tl.arange(0, HEAD)
    known = c < width
    entry = table + slot * 4
    matrix = 0
    changed = live
    if ADAPTED:
        changed = live & (tl.load(entry, mask=live, other=0) > 0)
        if HOIST:
            matrix = _matrix(flat, entry, live, 0, c, width, known, False, RANKS)
    dtype = dout.dtype.element_ty
    for tile in tl.range(0, SPAN, num_stages=3):
        row, inside = _rows(share, lane, before + tile, ROWS)
        mask = inside[:, None] & known[None, :]
        where = row[:, None] * width + c[None, :]
        total = tl.load(dout + where, mask=mask, other=0.0).to(tl.float32)
        found = tl.load(out + where, mask=mask, other=0.0).to(tl.float32)
        if ADAPTED:
            total = _add(
                total, matrix, dh, flat, entry, live, row, inside, c, width, known, h_stride, False, RANKS, HOIST
            )  # fmt: skip
            total = total.to(dtype).to(tl.float32)
            tl.store(dout + where, total.to(dtype), mask=mask & changed)
        tl.store(products + head.to(tl.int64) * rows + row, tl.sum(total * found, 1), mask=inside)
