"""The radix tree of many token sequences, its depth-first layout, and where to cut it. Compiled by numba.

Node 0 is an empty root above the forest; node n spells ids[start[n] : start[n] + length[n]].
"""

from __future__ import annotations

import numpy as np
from numba import njit


def _compiled(function):
    """By numba, kept on disk; anew in every process where no folder can be written to."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@_compiled
def _probe(keys, node, token):
    """Slot of the child of `node` that begins with `token`, or the empty slot where it belongs."""
    key = (np.int64(node) << 31) | np.int64(token)
    mask = keys.size - 1
    # Fibonacci hashing: the high bits of the product are the well-mixed ones
    slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot, key


@_compiled
def radix_tree(ids, offsets):
    """(start, length, parent, last_node): nodes of the radix tree, and the node that ends with each pair."""
    S = offsets.size - 1
    capacity = 2 * S + 1  # a pair adds at most its own leaf and one split
    start, length = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
    parent, last_node = np.full(capacity, -1, np.int64), np.empty(S, np.int64)
    num_slots = 1
    while num_slots < 2 * capacity:
        num_slots *= 2
    keys, children = np.full(num_slots, -1, np.int64), np.empty(num_slots, np.int64)
    num_nodes = 1
    for s in range(S):
        at, end, node = offsets[s], offsets[s + 1], 0
        while at < end:
            slot, key = _probe(keys, node, ids[at])
            if keys[slot] == -1:
                keys[slot], children[slot] = key, num_nodes
                start[num_nodes], length[num_nodes], parent[num_nodes] = at, end - at, node
                node = num_nodes
                num_nodes += 1
                break
            child = children[slot]
            edge, most = start[child], min(length[child], end - at)
            common = 1
            while common < most and ids[edge + common] == ids[at + common]:
                common += 1
            if common < length[child]:
                # the lower part keeps the name: pairs that end at `child` and its children stay right
                upper = num_nodes
                num_nodes += 1
                start[upper], length[upper], parent[upper] = edge, common, node
                children[slot] = upper
                start[child], length[child], parent[child] = edge + common, length[child] - common, upper
                slot, key = _probe(keys, upper, ids[edge + common])
                keys[slot], children[slot] = key, child
                child = upper
            node = child
            at += common
        last_node[s] = node
    return start[:num_nodes], length[:num_nodes], parent[:num_nodes], last_node


@_compiled
def layout(start, length, parent, last_node):
    """(order, place, depth, subtree): the nodes, parents first; and of each node the packed index and the
    depth of its first token, and its tokens, descendants included.

    `order` meets nodes as the pairs do, so siblings are laid out in order of first appearance.
    """
    num_nodes = start.size
    order, place = np.empty(num_nodes, np.int64), np.full(num_nodes, -1, np.int64)
    depth, subtree = np.zeros(num_nodes, np.int64), length.copy()
    place[0], order[0], met = 0, 0, 1
    for s in range(last_node.size):
        node, first = last_node[s], met
        while place[node] == -1:
            place[node], order[met] = 0, node
            met += 1
            node = parent[node]
        order[first:met] = order[first:met][::-1].copy()
    for i in range(num_nodes - 1, 0, -1):
        subtree[parent[order[i]]] += subtree[order[i]]
    free = np.zeros(num_nodes, np.int64)  # packed index where the next child of a node goes
    for i in range(1, num_nodes):
        node, above = order[i], parent[order[i]]
        place[node], depth[node] = free[above], depth[above] + length[above]
        free[above] += subtree[node]
        free[node] = place[node] + length[node]
    return order, place, depth, subtree


@_compiled
def fill_tree(ids, start, length, order, place, depth, subtree):
    """(input_ids, position_ids, subtree_end), each (T,)."""
    T = subtree[0]
    input_ids = np.empty(T, np.int64)
    position_ids, subtree_end = np.empty(T, np.int32), np.empty(T, np.int32)
    for i in range(1, order.size):
        node = order[i]
        p, edge = place[node], start[node]
        for t in range(length[node]):
            input_ids[p + t] = ids[edge + t]
            position_ids[p + t] = depth[node] + t
            subtree_end[p + t] = p + subtree[node]
    return input_ids, position_ids, subtree_end


@_compiled
def fill_rows(ids, offsets, state_lengths, parent, last_node, place, depth):
    """(source_rows, target_ids, sub_trajectory), each (M,)."""
    S = state_lengths.size
    M = offsets[S] - state_lengths.sum()
    source_rows, target_ids = np.empty(M, np.int64), np.empty(M, np.int64)
    sub_trajectory = np.empty(M, np.int64)
    row_end = 0
    for s in range(S):
        begin, first, last = offsets[s], state_lengths[s], offsets[s + 1] - offsets[s]
        row = row_end - first  # row + t is the row of the token at depth t
        row_end += last - first
        for t in range(first, last):
            target_ids[row + t] = ids[begin + t]
            sub_trajectory[row + t] = s
        # sources are the tokens one level higher, found from the last node up
        node, below = last_node[s], last - 1
        while below >= first:
            low = max(depth[node], first - 1)
            for t in range(low, below):
                source_rows[row + t + 1] = place[node] + t - depth[node]
            below = min(below, low)
            node = parent[node]
    return source_rows, target_ids, sub_trajectory


@_compiled
def fill_paths(offsets, length, parent, last_node, place, depth):
    """(N,) packed index of every id of every sequence, where `offsets` has them; nodes as `layout` placed them."""
    paths = np.empty(offsets[-1], np.int64)
    for s in range(last_node.size):
        node = last_node[s]
        while node > 0:
            first = offsets[s] + depth[node]
            for t in range(length[node]):
                paths[first + t] = place[node] + t
            node = parent[node]
    return paths


@_compiled
def shared_with_previous(ids, offsets, order):
    """(S,) tokens a pair shares with the one before it in `order`: all that it shares with any before."""
    shared = np.zeros(order.size, np.int64)
    for i in range(1, order.size):
        a, b = offsets[order[i - 1]], offsets[order[i]]
        most = min(offsets[order[i - 1] + 1] - a, offsets[order[i] + 1] - b)
        common = 0
        while common < most and ids[a + common] == ids[b + common]:
            common += 1
        shared[i] = common
    return shared


@_compiled
def cheapest_cuts(lengths, shared, budget):
    """Bounds (0, ..., S) of runs that fit and repeat the fewest tokens in all, then of fewest runs.

    A run i..j-1 packs lengths[i] tokens, then lengths - shared for each other pair. It fits within `budget`,
    or within the longest pair if all of its pairs exceed the budget. A part of what fits fits too, so the
    starts that fit end j form a window that only moves on: a monotone queue finds every best start in O(S).
    """
    S, longest, last_within = lengths.size, lengths.max(), -1
    packed = np.zeros(S + 1, np.int64)  # tokens of the forest before each pair
    packed[1:] = np.cumsum(lengths - shared)
    cost = np.zeros(S + 1, np.int64)  # of the best cuts before j: repeated tokens * (S + 1) + runs
    best_start = np.zeros(S + 1, np.int64)
    queue, head, tail = np.empty(S, np.int64), 0, 0
    through = np.empty(S, np.int64)  # cost of a run that starts at i
    for j in range(1, S + 1):
        i = j - 1
        through[i] = cost[i] + (shared[i] * (S + 1) if i else 0) + 1
        while tail > head and through[queue[tail - 1]] > through[i]:
            tail -= 1
        queue[tail] = i
        tail += 1
        if lengths[i] <= budget:
            last_within = i
        while True:
            run = packed[j] - packed[queue[head]] + shared[queue[head]]
            if run <= budget or run <= longest and queue[head] > last_within:
                break
            head += 1
        best_start[j], cost[j] = queue[head], through[queue[head]]
    num_runs = 0
    j = S
    while j > 0:
        num_runs, j = num_runs + 1, best_start[j]
    bounds = np.zeros(num_runs + 1, np.int64)
    j = S
    for n in range(num_runs, 0, -1):
        bounds[n], j = j, best_start[j]
    return bounds
