/* cgroup/sendmsg4, cgroup/sendmsg6: QUIC (UDP 443) by sendto and sendmsg is
 * refused with EPERM, so that clients fall back to TCP, which is steered. */

static __always_inline int sidecar_sendmsg(struct bpf_sock_addr *ctx, struct sidecar_origin *origin)
{
    struct sidecar_config *cfg = sidecar_config();
    u32 port = SIDECAR_QUIC_PORT;

    if (!cfg || origin->original.port != SIDECAR_QUIC_PORT || !(cfg->flags & SIDECAR_REFUSE_QUIC))
        return 1;
    if (!ports.lookup(&port) || sidecar_excluded(&origin->original) || sidecar_not_ours(cfg->instance))
        return 1;
    sidecar_who(origin);
    origin->cookie = bpf_get_socket_cookie(ctx);
    origin->netns_cookie = bpf_get_netns_cookie(ctx);
    sidecar_tell(SIDECAR_EVENT_QUIC, 1, origin);
    return 0;
}

int sidecar_sendmsg4(struct bpf_sock_addr *ctx)
{
    struct sidecar_origin origin = {};

    sidecar_set4(origin.original.bytes, ctx->user_ip4);
    origin.original.port = bpf_ntohs((u16)ctx->user_port);
    origin.original.family = SIDECAR_AF_INET;
    return sidecar_sendmsg(ctx, &origin);
}

int sidecar_sendmsg6(struct bpf_sock_addr *ctx)
{
    struct sidecar_origin origin = {};
    u32 words[4];

    words[0] = ctx->user_ip6[0];
    words[1] = ctx->user_ip6[1];
    words[2] = ctx->user_ip6[2];
    words[3] = ctx->user_ip6[3];
    __builtin_memcpy(origin.original.bytes, words, 16);
    origin.original.port = bpf_ntohs((u16)ctx->user_port);
    origin.original.family = SIDECAR_AF_INET6;
    return sidecar_sendmsg(ctx, &origin);
}
