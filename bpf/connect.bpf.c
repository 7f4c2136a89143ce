/* cgroup/connect4, cgroup/connect6: mark what is to be steered and note who
 * dialled what. Returns 1 to go on, 0 to refuse with EPERM. */

/* A socket that was steered before and now dials what is none of our business:
 * its earlier connection is over (the hook runs on unconnected sockets only),
 * and the guard would hold it to the listener for ever. */
static __always_inline int sidecar_release(struct bpf_sock_addr *ctx, struct sidecar_config *cfg)
{
    struct sidecar_origin *kept;
    u32 none = 0;

    if (!ctx->sk)
        return 1;
    kept = steered.sk_storage_get(ctx->sk, 0, 0);
    if (kept) {
        /* A mark in a container's namespace is none of ours. */
        if (kept->netns_cookie == cfg->netns_cookie &&
            bpf_setsockopt(ctx, SIDECAR_SOL_SOCKET, SIDECAR_SO_MARK, &none, sizeof(none)))
            return 0;
        steered.sk_storage_delete(ctx->sk);
    }
    return 1;
}

/* The kernel takes a wildcard destination for the socket's own address or for
 * loopback, after this hook; conntrack, and a rule, will see that address. */
static __always_inline u32 sidecar_own4(struct bpf_sock_addr *ctx)
{
    u32 own = ctx->sk ? ctx->sk->src_ip4 : 0;

    return own ? own : bpf_htonl(0x7f000001);
}

static __always_inline int sidecar_is_loopback(struct sidecar_address *address)
{
    u64 head;
    u32 middle, tail;

    if (address->bytes[10] == 0xff && address->bytes[11] == 0xff && !address->bytes[0])
        return address->bytes[12] == 127;
    __builtin_memcpy(&head, address->bytes, 8);
    __builtin_memcpy(&middle, address->bytes + 8, 4);
    __builtin_memcpy(&tail, address->bytes + 12, 4);
    return !head && !middle && tail == bpf_htonl(1);
}

static __always_inline int sidecar_keep(struct bpf_sock_addr *ctx, struct sidecar_origin *origin)
{
    struct sidecar_origin *kept = steered.sk_storage_get(ctx->sk, origin, BPF_SK_STORAGE_GET_F_CREATE);

    if (!kept) {
        sidecar_tell(SIDECAR_EVENT_MAP_FULL, 1, origin);
        return 0;
    }
    *kept = *origin; /* a socket that connects again dials anew */
    return 1;
}

static __always_inline int sidecar_connect(struct bpf_sock_addr *ctx, struct sidecar_origin *origin)
{
    struct sidecar_config *cfg = sidecar_config();
    int zero = 0;
    u64 *beat;
    u32 port = origin->original.port;
    u32 mark;
    char nothing[4] = {};

    if (!cfg)
        return 1;
    if (ctx->type != SIDECAR_SOCK_STREAM)
        return 1;
    if (!ports.lookup(&port) || sidecar_excluded(&origin->original) || sidecar_not_ours(cfg->instance))
        return sidecar_release(ctx, cfg);

    sidecar_who(origin);
    origin->cookie = bpf_get_socket_cookie(ctx);
    origin->netns_cookie = bpf_get_netns_cookie(ctx);
    mark = cfg->mark;

    if (origin->netns_cookie != cfg->netns_cookie) {
        /* No rule of ours stands in that namespace: marking would steer nothing. */
        if (cfg->flags & SIDECAR_REFUSE_FOREIGN_NETNS) {
            sidecar_tell(SIDECAR_EVENT_NETNS_REFUSED, 1, origin);
            return 0;
        }
        if (!(cfg->flags & SIDECAR_STEER_CONTAINERS) || sidecar_is_loopback(&origin->original)) {
            sidecar_tell(SIDECAR_EVENT_NETNS_RECORDED, 0, origin);
            return 1;
        }
    }

    beat = heartbeat.lookup(&zero);
    if (!beat || origin->ktime_ns > *beat + cfg->heartbeat_timeout_ns) {
        if (cfg->flags & SIDECAR_FAIL_OPEN) {
            sidecar_tell(SIDECAR_EVENT_FAIL_OPEN, 0, origin);
            return sidecar_release(ctx, cfg);
        }
        sidecar_tell(SIDECAR_EVENT_STALE, 1, origin);
        return 0;
    }

    if (!ctx->sk) {
        sidecar_tell(SIDECAR_EVENT_MARK, 1, origin);
        return 0;
    }
    if (origin->netns_cookie != cfg->netns_cookie)
        /* A container: steered where its packets enter the host (nftables, by
         * bridge). Here it is only noted who dialled. */
        return sidecar_keep(ctx, origin);
    if (origin->original.family == SIDECAR_AF_INET6 && origin->original.bytes[0] == 0xfe &&
        (origin->original.bytes[1] & 0xc0) == 0x80) {
        /* Scoped: the kernel binds the socket to a device after this hook, and a
         * redirect would time out. */
        sidecar_tell(SIDECAR_EVENT_LINK_LOCAL, 1, origin);
        return 0;
    }
    if (ctx->sk->bound_dev_if &&
        bpf_setsockopt(ctx, SIDECAR_SOL_SOCKET, SIDECAR_SO_BINDTODEVICE, nothing, sizeof(nothing))) {
        sidecar_tell(SIDECAR_EVENT_DEVICE, 1, origin);
        return 0;
    }
    if (bpf_setsockopt(ctx, SIDECAR_SOL_SOCKET, SIDECAR_SO_MARK, &mark, sizeof(mark))) {
        sidecar_tell(SIDECAR_EVENT_MARK, 1, origin);
        return 0;
    }
    return sidecar_keep(ctx, origin);
}

int sidecar_connect4(struct bpf_sock_addr *ctx)
{
    struct sidecar_origin origin = {};
    u32 address = ctx->user_ip4;

    if (!address)
        address = sidecar_own4(ctx);
    sidecar_set4(origin.original.bytes, address);
    origin.original.port = bpf_ntohs((u16)ctx->user_port);
    origin.original.family = SIDECAR_AF_INET;
    return sidecar_connect(ctx, &origin);
}

int sidecar_connect6(struct bpf_sock_addr *ctx)
{
    struct sidecar_origin origin = {};
    u32 words[4];

    words[0] = ctx->user_ip6[0];
    words[1] = ctx->user_ip6[1];
    words[2] = ctx->user_ip6[2];
    words[3] = ctx->user_ip6[3];
    if (!words[0] && !words[1] && !words[3]) {
        if (words[2] == bpf_htonl(0xffff))
            words[3] = sidecar_own4(ctx);
        else if (!words[2] && ctx->sk && ctx->sk->src_ip6[2] == bpf_htonl(0xffff)) {
            words[2] = bpf_htonl(0xffff);
            words[3] = bpf_htonl(0x7f000001);
        } else if (!words[2])
            words[3] = bpf_htonl(1);
    }
    __builtin_memcpy(origin.original.bytes, words, 16);
    origin.original.port = bpf_ntohs((u16)ctx->user_port);
    origin.original.family = SIDECAR_AF_INET6;
    return sidecar_connect(ctx, &origin);
}
