/* Layouts shared with user space: mirrored in sidecar/kernel/abi.py, compared
 * in tests/kernel/test_abi.py. All fields are naturally aligned and padded by
 * hand, so that no compiler adds a hole. */
#ifndef SIDECAR_ABI_H
#define SIDECAR_ABI_H

#define SIDECAR_COMM_LEN 16

/* config.flags */
#define SIDECAR_FAIL_OPEN 1u
#define SIDECAR_REFUSE_FOREIGN_NETNS 2u
#define SIDECAR_REFUSE_QUIC 4u
#define SIDECAR_STEER_CONTAINERS 8u

/* owner.role */
#define SIDECAR_ROLE_INSPECTOR 1u
#define SIDECAR_ROLE_EXCLUSIVE 2u

/* event.reason; names in sidecar/kernel/abi.py */
#define SIDECAR_EVENT_STALE 1u
#define SIDECAR_EVENT_FAIL_OPEN 2u
#define SIDECAR_EVENT_NETNS_REFUSED 3u
#define SIDECAR_EVENT_NETNS_RECORDED 4u
#define SIDECAR_EVENT_DEVICE 5u
#define SIDECAR_EVENT_LINK_LOCAL 6u
#define SIDECAR_EVENT_MAP_FULL 7u
#define SIDECAR_EVENT_MARK 8u
#define SIDECAR_EVENT_GUARD 9u
#define SIDECAR_EVENT_QUIC 10u
#define SIDECAR_EVENT_BIND 11u

struct sidecar_config {
    u64 netns_cookie;
    u64 instance;
    u64 heartbeat_timeout_ns;
    u32 mark;
    u32 flags;
    u32 listen_port; /* host byte order */
    u32 pad;
};

struct sidecar_owner {
    u64 instance;
    u32 role;
    u32 pad;
};

struct sidecar_address {
    u8 bytes[16]; /* IPv4 as ::ffff:a.b.c.d */
    u16 port;     /* host byte order */
    u16 family;   /* AF_INET or AF_INET6, as the client dialled */
    u32 pad;
};

struct sidecar_origin {
    u64 cookie;
    u64 netns_cookie;
    u64 cgroup_id;
    u64 ktime_ns;
    u32 pid;
    u32 tgid;
    u32 uid;
    u32 gid;
    char comm[SIDECAR_COMM_LEN];
    struct sidecar_address original;
};

/* A TCP connection as it leaves the stack of its network namespace, after NAT
 * there: the host's names our listener, a container's what it dialled. */
struct sidecar_flow_key {
    u8 source[16];
    u8 destination[16];
    u16 source_port;
    u16 destination_port;
    u32 pad;
};

struct sidecar_event {
    u32 reason;
    u32 refused; /* 1: the connection or packet was stopped */
    struct sidecar_origin origin;
};

struct sidecar_prefix4 {
    u32 prefixlen;
    u8 bytes[4];
};

struct sidecar_prefix6 {
    u32 prefixlen;
    u8 bytes[16];
};

#endif
