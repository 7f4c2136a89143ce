/* Maps and the few decisions that more than one hook takes. One compilation
 * unit: the loader joins the hooks behind this. */
#ifndef SIDECAR_COMMON_H
#define SIDECAR_COMMON_H

#include "abi.h"

#define SIDECAR_AF_INET 2
#define SIDECAR_AF_INET6 10
#define SIDECAR_SOCK_STREAM 1
#define SIDECAR_IPPROTO_TCP 6
#define SIDECAR_IPPROTO_UDP 17
#define SIDECAR_SOL_SOCKET 1
#define SIDECAR_SO_BINDTODEVICE 25
#define SIDECAR_SO_MARK 36
#define SIDECAR_QUIC_PORT 443
#define SIDECAR_CGROUP_LEVELS 10

BPF_ARRAY(config, struct sidecar_config, 1);
BPF_ARRAY(heartbeat, u64, 1);
BPF_HASH(ports, u32, u8, 1024);
BPF_F_TABLE("lpm_trie", struct sidecar_prefix4, u8, exclude4, 1024, 1 /* BPF_F_NO_PREALLOC */);
BPF_F_TABLE("lpm_trie", struct sidecar_prefix6, u8, exclude6, 1024, 1);
/* Lives exactly as long as the socket: no garbage to collect, nothing to run
 * full. */
BPF_SK_STORAGE(steered, struct sidecar_origin);
BPF_HASH(flows, struct sidecar_flow_key, struct sidecar_origin, 65536);
BPF_RINGBUF_OUTPUT(events, 64);
/* Events that found the ring full. */
BPF_ARRAY(lost, u64, 1);
/* Of all instances of this host: who owns a cgroup. Pinned, root only. */
BPF_TABLE_PINNED("hash", u64, struct sidecar_owner, owners, 4096, SIDECAR_OWNERS_PIN);

static __always_inline struct sidecar_config *sidecar_config(void)
{
    int zero = 0;
    return config.lookup(&zero);
}

/* 1: leave this task alone: an inspector's own, or of a scope that another
 * instance steers. */
static __always_inline int sidecar_not_ours(u64 instance)
{
    struct sidecar_owner *owner;
    u64 id;

#pragma unroll
    for (int level = 1; level <= SIDECAR_CGROUP_LEVELS; level++) {
        id = bpf_get_current_ancestor_cgroup_id(level);
        if (!id)
            return 0;
        owner = owners.lookup(&id);
        if (!owner)
            continue;
        if (owner->role == SIDECAR_ROLE_INSPECTOR)
            return 1;
        if (owner->role == SIDECAR_ROLE_EXCLUSIVE && owner->instance != instance)
            return 1;
    }
    return 0;
}

static __always_inline void sidecar_who(struct sidecar_origin *origin)
{
    u64 ids = bpf_get_current_pid_tgid();
    u64 users = bpf_get_current_uid_gid();

    origin->cgroup_id = bpf_get_current_cgroup_id();
    origin->ktime_ns = bpf_ktime_get_ns();
    origin->pid = (u32)ids;
    origin->tgid = ids >> 32;
    origin->uid = (u32)users;
    origin->gid = users >> 32;
    bpf_get_current_comm(origin->comm, sizeof(origin->comm));
}

static __always_inline void sidecar_tell(u32 reason, u32 refused, struct sidecar_origin *origin)
{
    struct sidecar_event event = {};
    int zero = 0;
    u64 *count;

    event.reason = reason;
    event.refused = refused;
    event.origin = *origin;
    if (!events.ringbuf_output(&event, sizeof(event), 0))
        return;
    count = lost.lookup(&zero);
    if (count)
        __sync_fetch_and_add(count, 1);
}

static __always_inline void sidecar_set4(u8 *bytes, u32 address_be)
{
    __builtin_memset(bytes, 0, 10);
    bytes[10] = 0xff;
    bytes[11] = 0xff;
    __builtin_memcpy(bytes + 12, &address_be, 4);
}

static __always_inline int sidecar_excluded4(u32 address_be)
{
    struct sidecar_prefix4 key = {.prefixlen = 32};

    __builtin_memcpy(key.bytes, &address_be, 4);
    return exclude4.lookup(&key) != 0;
}

static __always_inline int sidecar_excluded6(u8 *bytes)
{
    struct sidecar_prefix6 key = {.prefixlen = 128};

    __builtin_memcpy(key.bytes, bytes, 16);
    return exclude6.lookup(&key) != 0;
}

/* The excluded lists decide by the real family: ::ffff:a.b.c.d is IPv4. */
static __always_inline int sidecar_excluded(struct sidecar_address *address)
{
    u32 v4;

    if (address->bytes[10] == 0xff && address->bytes[11] == 0xff && !address->bytes[0]) {
        __builtin_memcpy(&v4, address->bytes + 12, 4);
        return sidecar_excluded4(v4);
    }
    return sidecar_excluded6(address->bytes);
}

#endif
